"""What other people's programs send when they connect and draw, and what they read: one class for each program.

The requests are written from the programs' sources, with the headers of the libraries that send them. `source` says
from which, and at which commit. A class reads an answer as its program does: the same fields, no others, with the same
types. What a program would stumble over raises here.
"""

import base64
import json
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import httpx

from tests.servers import Json

NODE_FETCH = {
    "Accept": "*/*",
    "Accept-Encoding": "gzip, deflate, br",
    "User-Agent": "node-fetch",
    "Connection": "close",
}
AIOHTTP = {"Accept": "*/*", "Accept-Encoding": "gzip, deflate, br", "User-Agent": "Python/3.11 aiohttp/3.13.2"}
AXIOS = {
    "Accept": "application/json, text/plain, */*",
    "Accept-Encoding": "gzip, compress, deflate, br",
    "User-Agent": "axios/1.12.1",
}
REQUESTS = {"Accept": "*/*", "Accept-Encoding": "gzip, deflate", "User-Agent": "python-requests/2.32.5"}
PYTHON_SDK = {
    "Accept": "application/json",
    "Accept-Encoding": "gzip, deflate",
    "User-Agent": "OpenAI/Python 3.57.0",
    "x-stainless-lang": "python",
    "x-stainless-package-version": "3.57.0",
    "x-stainless-os": "Linux",
    "x-stainless-arch": "x64",
    "x-stainless-runtime": "CPython",
    "x-stainless-runtime-version": "3.11.7",
    "x-stainless-async": "false",
    "x-stainless-retry-count": "0",
    "x-stainless-read-timeout": "600",
}
JAVASCRIPT_SDK = {
    "Accept": "application/json",
    "Accept-Encoding": "gzip, deflate",
    "Accept-Language": "*",
    "Sec-Fetch-Mode": "cors",
    "User-Agent": "OpenAI/JS 6.49.0",
    "x-stainless-lang": "js",
    "x-stainless-package-version": "6.49.0",
    "x-stainless-os": "Linux",
    "x-stainless-arch": "x64",
    "x-stainless-runtime": "node",
    "x-stainless-runtime-version": "v20.20.2",
    "x-stainless-retry-count": "0",
}
JSON = {"Content-Type": "application/json"}


@dataclass(frozen=True)
class Call:
    """A request."""

    method: str
    path: str
    headers: Mapping[str, str]
    body: bytes = b""

    def send(self, client: httpx.Client) -> httpx.Response:
        return client.request(self.method, self.path, headers=dict(self.headers), content=self.body)


def multipart(fields: Json, files: Sequence[tuple[str, str, str, bytes]]) -> tuple[dict[str, str], bytes]:
    """The header and the body of a form.

    Args:
        files: name of the field, name of the file, media type, content.
    """
    boundary = "----formdata-stepwise-0123456789"
    parts = [f'Content-Disposition: form-data; name="{name}"\r\n\r\n{value}'.encode() for name, value in fields.items()]
    for name, filename, kind, content in files:
        head = f'Content-Disposition: form-data; name="{name}"; filename="{filename}"\r\nContent-Type: {kind}\r\n\r\n'
        parts.append(head.encode() + content)
    body = b"".join(f"--{boundary}\r\n".encode() + part + b"\r\n" for part in parts)
    return {"Content-Type": f"multipart/form-data; boundary={boundary}"}, body + f"--{boundary}--\r\n".encode()


@dataclass(frozen=True)
class Program(ABC):
    """A program whose settings have this server's address.

    Args:
        key: the API key in the program's settings; empty without one.
        params: what a user may add to each request, where the program lets users do so.
    """

    key: str = ""
    params: Json = field(default_factory=dict)

    source: ClassVar[str]
    sends_key: ClassVar[bool] = True

    @staticmethod
    def credentials(key: str) -> str:
        """What a user types for an API key of the server."""
        return key

    def connect(self, client: httpx.Client) -> None:
        """All that the program asks before it draws."""
        del client  # most programs ask nothing

    @abstractmethod
    def draw(self, prompt: str) -> Call: ...

    def edit(self, prompt: str, png: bytes) -> Call | None:
        """The request to change an image; None if the program has none."""
        return None

    @abstractmethod
    def read(self, answer: httpx.Response, client: httpx.Client) -> list[bytes]:
        """The images."""

    @abstractmethod
    def shown(self, answer: httpx.Response) -> str:
        """What a user of the program is shown of an error."""


# OpenAI's API.


def bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key or 'none'}"}  # the programs refuse an empty key, so people type anything


def sdk_message(answer: httpx.Response) -> str:
    """The message of the exception that OpenAI's SDKs raise. Both read `error`, else the body."""
    error = answer.json()["error"]
    assert isinstance(error["message"], str)
    assert error.keys() >= {"message", "type", "param", "code"}
    return str(error["message"])


class OpenWebUI(Program):
    """Its engine `openai`, the default."""

    source = "open-webui/open-webui backend/open_webui/routers/images.py at 02530d5"

    def draw(self, prompt: str) -> Call:
        body = {"model": "dall-e-2", "prompt": prompt, "n": 1, "size": "512x512", "response_format": "b64_json"}
        headers = {**AIOHTTP, **bearer(self.key), **JSON}
        return Call("POST", "/v1/images/generations", headers, json.dumps({**body, **self.params}).encode())

    def edit(self, prompt: str, png: bytes) -> Call:
        fields = {"model": "gpt-image-1", "prompt": prompt, "n": 1, "size": "512x512"}
        head, body = multipart(fields, [("image", "6a3f.png", "image/png", png)])
        return Call("POST", "/v1/images/edits", {**AIOHTTP, **bearer(self.key), **head}, body)

    def read(self, answer: httpx.Response, client: httpx.Client) -> list[bytes]:
        answer.raise_for_status()
        images = []
        for image in answer.json()["data"]:
            if url := image.get("url", None):
                fetched = client.get(url, headers=bearer(self.key)).raise_for_status()
                assert fetched.headers["content-type"].split("/")[0] == "image"
                images.append(fetched.content)
            else:
                images.append(base64.b64decode(image["b64_json"], validate=True))
        return images

    def shown(self, answer: httpx.Response) -> str:
        assert answer.is_error
        return answer.reason_phrase


class OpenWebUIModelNamedGptImage(OpenWebUI):
    """The same with a model whose name begins with gpt-image, and API version and parameters filled in."""

    def draw(self, prompt: str) -> Call:
        body = {"model": "gpt-image-1.5", "prompt": prompt, "n": 2, "size": "auto"}
        headers = {**AIOHTTP, **bearer(self.key), **JSON}
        path = "/v1/images/generations?api-version=2025-04-01-preview"
        return Call("POST", path, headers, json.dumps({**body, **self.params}).encode())


class LibreChat(Program):
    """Its tools image_gen_oai (by the JavaScript SDK) and image_edit_oai (by axios)."""

    source = "danny-avila/LibreChat api/app/clients/tools/structured/OpenAIImageTools.js at 00b3bc3"

    def draw(self, prompt: str) -> Call:
        body = {"model": "gpt-image-1", "prompt": prompt, "n": 1, "background": "auto", "output_format": "png"}
        body |= {"quality": "auto", "size": "auto"}
        headers = {**JAVASCRIPT_SDK, **bearer(self.key), **JSON}
        return Call("POST", "/v1/images/generations", headers, json.dumps(body).encode())

    def edit(self, prompt: str, png: bytes) -> Call:
        fields = {"model": "gpt-image-1", "prompt": prompt, "quality": "auto", "size": "auto"}
        head, body = multipart(fields, [("image[]", "photo.png", "image/png", png)])
        return Call("POST", "/v1/images/edits", {**AXIOS, **bearer(self.key), **head}, body)

    def read(self, answer: httpx.Response, client: httpx.Client) -> list[bytes]:
        answer.raise_for_status()
        return [base64.b64decode(answer.json()["data"][0]["b64_json"], validate=True)]

    def shown(self, answer: httpx.Response) -> str:
        return f"{answer.status_code} {sdk_message(answer)}"


class LobeChat(Program):
    source = "lobehub/lobehub packages/model-runtime/src/core/openaiCompatibleFactory/createImage.ts at 1ae7c13"

    def connect(self, client: httpx.Client) -> None:
        """Its list of models, which a user may fetch."""
        answer = Call("GET", "/v1/models", {**JAVASCRIPT_SDK, **bearer(self.key)}).send(client).raise_for_status()
        for model in answer.json()["data"]:
            assert isinstance(model["id"], str)
            assert isinstance(model["created"], int)

    def draw(self, prompt: str) -> Call:
        body = {"model": "gpt-image-1", "n": 1, "prompt": prompt, "quality": "auto", **self.params}
        headers = {**JAVASCRIPT_SDK, **bearer(self.key), **JSON}
        return Call("POST", "/v1/images/generations", headers, json.dumps(body).encode())

    def edit(self, prompt: str, png: bytes) -> Call:
        fields = {"model": "gpt-image-1", "n": 1, "input_fidelity": "high", "prompt": prompt}
        head, body = multipart(fields, [("image", "image.png", "image/png", png)])
        return Call("POST", "/v1/images/edits", {**JAVASCRIPT_SDK, **bearer(self.key), **head}, body)

    def read(self, answer: httpx.Response, client: httpx.Client) -> list[bytes]:
        answer.raise_for_status()
        said = answer.json()
        usage = said["usage"]
        details = usage["input_tokens_details"]
        tokens = [usage["input_tokens"], usage["output_tokens"], usage["total_tokens"]]
        assert all(type(n) is int for n in [*tokens, details["image_tokens"], details["text_tokens"]])
        assert isinstance(said["data"], list)
        return [base64.b64decode(said["data"][0]["b64_json"], validate=True)]

    def shown(self, answer: httpx.Response) -> str:
        return f"{answer.status_code} {sdk_message(answer)}"


class N8n(Program):
    """Its OpenAI node, version 2, with the options that a user may add. It lists models only in its picker."""

    source = "n8n-io/n8n packages/@n8n/nodes-langchain/nodes/vendors/OpenAi/v2/actions/image at 0713e95"

    def connect(self, client: httpx.Client) -> None:
        answer = Call("GET", "/v1/models", {**AXIOS, **bearer(self.key)}).send(client).raise_for_status()
        assert all(model["id"].upper() for model in answer.json()["data"])

    def draw(self, prompt: str) -> Call:
        body = {"prompt": prompt, "model": "dall-e-2", "response_format": "b64_json"}
        options = {"n": 2, "quality": "hd", "size": "1024x1024", "style": "vivid"}
        headers = {**AXIOS, **bearer(self.key), "OpenAI-Organization": "", **JSON}
        return Call("POST", "/v1/images/generations", headers, json.dumps(body | options).encode())

    def edit(self, prompt: str, png: bytes) -> Call:
        fields = {"prompt": prompt, "model": "gpt-image-1", "n": 1, "size": "1024x1024", "quality": "auto"}
        head, body = multipart(fields, [("image[]", "data.png", "image/png", png)])
        return Call("POST", "/v1/images/edits", {**AXIOS, **bearer(self.key), **head}, body)

    def read(self, answer: httpx.Response, client: httpx.Client) -> list[bytes]:
        answer.raise_for_status()
        return [base64.b64decode(entry["b64_json"], validate=True) for entry in answer.json()["data"]]

    def shown(self, answer: httpx.Response) -> str:
        return sdk_message(answer)


class LiteLLM(Program):
    """`litellm.image_generation(model="openai/digits", api_base=…)`, as litellm 1.110.2 sent it to a recorder."""

    source = "litellm 1.110.2, recorded"

    def draw(self, prompt: str) -> Call:
        body = {"model": "digits", "prompt": prompt, "n": 1, "size": "64x64", **self.params}
        headers = {**PYTHON_SDK, "x-stainless-raw-response": "true", **bearer(self.key), **JSON}
        return Call("POST", "/v1/images/generations", headers, json.dumps(body, separators=(",", ":")).encode())

    def edit(self, prompt: str, png: bytes) -> Call:
        fields = {"model": "gpt-image-1", "prompt": prompt}
        head, body = multipart(fields, [("image[]", "photo.png", "image/png", png)])
        headers = {"Accept": "*/*", "User-Agent": "litellm/1.110.2", **bearer(self.key), **head}
        return Call("POST", "/v1/images/edits", headers, body)

    def read(self, answer: httpx.Response, client: httpx.Client) -> list[bytes]:
        answer.raise_for_status()
        said = answer.json()
        assert type(said["created"]) is int
        return [base64.b64decode(image["b64_json"], validate=True) for image in said["data"]]

    def shown(self, answer: httpx.Response) -> str:
        return sdk_message(answer)


class LangChain(Program):
    """DallEAPIWrapper of langchain_community. It asks for no form, and reads links."""

    source = "langchain-ai/langchain libs/community/langchain_community/utilities/dalle_image_generator.py at 08b4fce"

    def draw(self, prompt: str) -> Call:
        body = {"prompt": prompt, "model": "dall-e-2", "n": 1, "quality": "standard", "size": "1024x1024"}
        headers = {**PYTHON_SDK, **bearer(self.key), **JSON}
        return Call("POST", "/v1/images/generations", headers, json.dumps(body, separators=(",", ":")).encode())

    def read(self, answer: httpx.Response, client: httpx.Client) -> list[bytes]:
        """The links, which a browser then opens. A browser opens `data:` URLs, too."""
        answer.raise_for_status()
        links = "\n".join([item["url"] for item in answer.json()["data"]]).split("\n")
        images = []
        for link in links:
            if link.startswith("data:image/png;base64,"):
                images.append(base64.b64decode(link.partition(",")[2], validate=True))
            else:
                images.append(httpx.get(link, trust_env=False).raise_for_status().content)
        return images

    def shown(self, answer: httpx.Response) -> str:
        return f"Error code: {answer.status_code} - {answer.json()}"


# AUTOMATIC1111's API.


def basic(credentials: str) -> dict[str, str]:
    """What programs send for `user:password`, and, where nothing is filled in, for the empty text.

    httpx sends no blank at the end: tests/test_other_programs.py sends one through a socket.
    """
    return {"Authorization": f"Basic {base64.b64encode(credentials.encode()).decode()}".rstrip()}


class OpenWebUIAutomatic1111(Program):
    """Its engine `automatic1111`. It looks at no status, so an error shows as a missing `images`."""

    source = OpenWebUI.source

    @staticmethod
    def credentials(key: str) -> str:
        return f"anyone:{key}"

    def connect(self, client: httpx.Client) -> None:
        """When the settings are saved: the address is tried, the models are listed, and one is chosen."""
        headers = {**AIOHTTP, **basic(self.key)}
        Call("GET", "/sdapi/v1/options", headers).send(client).raise_for_status()
        models = Call("GET", "/sdapi/v1/sd-models", headers).send(client).json()
        assert all(isinstance(model["model_name"], str) for model in models)
        chosen = models[0]["title"]
        options = Call("GET", "/sdapi/v1/options", headers).send(client).json()
        assert isinstance(options["sd_model_checkpoint"], str)
        options["sd_model_checkpoint"] = chosen
        body = json.dumps(options).encode()
        Call("POST", "/sdapi/v1/options", {**headers, **JSON}, body).send(client).raise_for_status()

    def draw(self, prompt: str) -> Call:
        body = {"prompt": prompt, "batch_size": 2, "width": 512, "height": 512, "steps": 7, **self.params}
        headers = {**AIOHTTP, **basic(self.key), **JSON}
        return Call("POST", "/sdapi/v1/txt2img", headers, json.dumps(body).encode())

    def read(self, answer: httpx.Response, client: httpx.Client) -> list[bytes]:
        said = answer.json()
        assert said["info"]
        return [base64.b64decode(image, validate=True) for image in said["images"]]

    def shown(self, answer: httpx.Response) -> str:
        assert "images" not in answer.json()
        return "'images'"


class SillyTavern(Program):
    """Its source `Stable Diffusion Web UI (AUTOMATIC1111)`. An empty password is sent as an empty Basic."""

    source = "SillyTavern/SillyTavern src/endpoints/stable-diffusion.js at 02903fd; its extension at ba6f7b7"

    @staticmethod
    def credentials(key: str) -> str:
        return f"anyone:{key}"

    @property
    def _headers(self) -> dict[str, str]:
        return {**NODE_FETCH, **basic(self.key)}

    def _get(self, client: httpx.Client, path: str) -> Any:
        return Call("GET", f"/sdapi/v1/{path}", self._headers).send(client).raise_for_status().json()

    def connect(self, client: httpx.Client) -> None:
        self._get(client, "options")
        upscalers = [one["name"] for one in self._get(client, "upscalers")]
        upscalers[1:1] = [one["name"] for one in self._get(client, "latent-upscale-modes")]
        assert isinstance(self._get(client, "sd-vae"), list)
        assert all(one["model_name"] for one in self._get(client, "sd-modules"))
        assert all(one["name"] for one in self._get(client, "samplers"))
        assert all(one["name"] for one in self._get(client, "schedulers"))
        titles = [one["title"] for one in self._get(client, "sd-models")]
        assert self._get(client, "options")["sd_model_checkpoint"] in titles
        body = json.dumps({"sd_model_checkpoint": titles[0]}).encode()
        Call("POST", "/sdapi/v1/options", {**self._headers, **JSON}, body).send(client).raise_for_status()
        progress = self._get(client, "progress")
        assert progress["progress"] == 0.0
        assert progress["state"]["job_count"] == 0

    def draw(self, prompt: str) -> Call:
        body: Json = {
            "url": "http://localhost:8000",
            "auth": self.key,
            "prompt": prompt,
            "negative_prompt": "",
            "sampler_name": "DPM++ 2M",
            "scheduler": "Karras",
            "steps": 9,
            "cfg_scale": 7,
            "width": 512,
            "height": 512,
            "restore_faces": False,
            "enable_hr": False,
            "hr_upscaler": "Latent",
            "hr_scale": 1,
            "hr_additional_modules": [],
            "denoising_strength": 0.7,
            "hr_second_pass_steps": 0,
            "override_settings": {"CLIP_stop_at_last_layers": 1},
            "override_settings_restore_afterwards": True,
            "clip_skip": 1,
            "save_images": True,
            "send_images": True,
            "do_not_save_grid": False,
            "do_not_save_samples": False,
            **self.params,
        }
        return Call("POST", "/sdapi/v1/txt2img", {**self._headers, **JSON}, json.dumps(body).encode())

    def interrupt(self) -> Call:
        """Sent when its browser goes away."""
        return Call("POST", "/sdapi/v1/interrupt", self._headers)

    def progress(self) -> Call:
        return Call("GET", "/sdapi/v1/progress", self._headers)

    def read(self, answer: httpx.Response, client: httpx.Client) -> list[bytes]:
        answer.raise_for_status()
        return [base64.b64decode(answer.json()["images"][0], validate=True)]

    def shown(self, answer: httpx.Response) -> str:
        """In its console; its page says `Internal Server Error`."""
        assert not answer.is_success
        return answer.text


class LibreChatStableDiffusion(Program):
    """Its tool stable-diffusion. It sends no key, and its model writes the negative prompt."""

    source = "danny-avila/LibreChat api/app/clients/tools/structured/StableDiffusion.js at 00b3bc3"
    sends_key = False

    def draw(self, prompt: str) -> Call:
        body = {"prompt": prompt, "negative_prompt": "", "cfg_scale": 4.5, "steps": 22, "width": 1024, "height": 1024}
        return Call("POST", "/sdapi/v1/txt2img", {**AXIOS, **JSON}, json.dumps(body).encode())

    def read(self, answer: httpx.Response, client: httpx.Client) -> list[bytes]:
        answer.raise_for_status()
        image, info = answer.json()["images"][0], json.loads(answer.json()["info"])
        assert type(info["seed"]) is int
        assert type(info["width"]) is int
        assert type(info["height"]) is int
        assert f"Seed: {info['seed']}" in info["infotexts"][0].split("\n").pop()
        return [base64.b64decode(image.split(",", 1)[0], validate=True)]

    def shown(self, answer: httpx.Response) -> str:
        assert answer.is_error
        return "Error making API request."


class Dify(Program):
    """Its plugin langgenius/stablediffusion. Its JSON has no media type, because requests gives none to text."""

    source = "langgenius/dify-official-plugins tools/stablediffusion at 7af2283"
    sends_key = False
    model = "digits"

    def connect(self, client: httpx.Client) -> None:
        answer = Call("GET", "/sdapi/v1/sd-models", REQUESTS).send(client)
        assert answer.status_code == 200
        names = [one["model_name"] for one in answer.json()]
        body = json.dumps({"sd_model_checkpoint": names[0]}).encode()
        assert Call("POST", "/sdapi/v1/options", REQUESTS, body).send(client).status_code == 200
        assert Call("GET", "/sdapi/v1/samplers", REQUESTS).send(client).json()[0]["name"]

    def draw(self, prompt: str) -> Call:
        body = {
            "prompt": prompt,
            "negative_prompt": "",
            "seed": -1,
            "subseed": -1,
            "subseed_strength": 0,
            "seed_resize_from_h": -1,
            "seed_resize_from_w": -1,
            "sampler_name": "DPM++ 2M",
            "batch_size": 1,
            "n_iter": 1,
            "steps": 10,
            "cfg_scale": 7,
            "width": 1024,
            "height": 1024,
            "do_not_save_samples": False,
            "do_not_save_grid": False,
            "override_settings": {"sd_model_checkpoint": self.model},
            "override_settings_restore_afterwards": True,
            "refiner_checkpoint": "",
            "refiner_switch_at": 0,
            "disable_extra_networks": False,
            "enable_hr": False,
            "firstphase_width": 0,
            "firstphase_height": 0,
            "hr_scale": 2,
            "hr_second_pass_steps": 0,
            "hr_resize_x": 0,
            "hr_resize_y": 0,
            "hr_prompt": "",
            "hr_negative_prompt": "",
            "script_args": [],
            "send_images": True,
            "save_images": False,
            "alwayson_scripts": {},
            "model": self.model,
            "lora": "",
        }
        return Call("POST", "/sdapi/v1/txt2img", REQUESTS, json.dumps(body).encode())

    def read(self, answer: httpx.Response, client: httpx.Client) -> list[bytes]:
        assert answer.status_code == 200
        return [base64.b64decode(answer.json()["images"][0])]

    def shown(self, answer: httpx.Response) -> str:
        assert answer.status_code != 200
        return "Failed to generate image"


PROGRAMS: tuple[type[Program], ...] = (
    OpenWebUI,
    OpenWebUIModelNamedGptImage,
    LibreChat,
    LobeChat,
    N8n,
    LiteLLM,
    LangChain,
    OpenWebUIAutomatic1111,
    SillyTavern,
    LibreChatStableDiffusion,
    Dify,
)


def told_seeds(answer: httpx.Response) -> list[int]:
    """The seeds that an answer of either API tells, whoever reads them."""
    said = answer.json()
    if "data" in said:
        return [image["seed"] for image in said["data"]]
    info = json.loads(said["info"])
    assert info["seed"] == info["all_seeds"][0]
    return list(info["all_seeds"])
