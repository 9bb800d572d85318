"""Security headers: they limit what a page may load, and forbid other pages to frame an answer."""

_ALWAYS = [
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
    (b"x-frame-options", b"DENY"),
]
# Only the playground and /docs load anything.
_POLICY = b"default-src 'none'; frame-ancestors 'none'"
# A browser that opens an image in a tab puts it on a page of its own, with inline styles.
_POLICY_OF_IMAGES = b"default-src 'none'; style-src 'unsafe-inline'; frame-ancestors 'none'"
_POLICY_OF_DOCS = (
    b"default-src 'none'; script-src 'self' 'unsafe-inline'; style-src 'self' 'unsafe-inline'; "
    b"img-src 'self' blob: data:; connect-src 'self'; frame-ancestors 'none'"
)
_POLICY_OF_PLAYGROUND = (
    b"default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob: data:; connect-src 'self'; "
    b"base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
_POLICIES = {"/": _POLICY_OF_PLAYGROUND, "/docs": _POLICY_OF_DOCS}


def security_headers(path: str, media_type: str) -> list[tuple[bytes, bytes]]:
    """The security headers of an answer of this media type to a request for this path."""
    policy = _POLICY_OF_IMAGES if media_type.startswith("image/") else _POLICIES.get(path, _POLICY)
    return [*_ALWAYS, (b"content-security-policy", policy)]
