"""What every image of the service says of itself: a model made it.

The mark is metadata in XMP, ISO 16684-1. IPTC names the property: Photo Metadata Standard, Digital Source Type.
"""

XMP = (
    '<?xpacket begin="\ufeff" id="W5M0MpCehiHzreSzNTczkc9d"?>'
    '<x:xmpmeta xmlns:x="adobe:ns:meta/">'
    '<rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">'
    '<rdf:Description rdf:about="" xmlns:Iptc4xmpExt="http://iptc.org/std/Iptc4xmpExt/2008-02-29/" '
    'Iptc4xmpExt:DigitalSourceType="http://cv.iptc.org/newscodes/digitalsourcetype/trainedAlgorithmicMedia"/>'
    "</rdf:RDF></x:xmpmeta>"
    '<?xpacket end="r"?>'
).encode()

# The content of a PNG's chunk iTXt: keyword, no compression, no language, no translated keyword, text.
# XMP specification, part 3, section 1.1.5.
PNG_ITXT = b"XML:com.adobe.xmp\0\0\0\0\0" + XMP
