"""The program `stepwise` against a running server: its output, its files and its exit codes."""

import io
import json
import os
import pty
import signal
import socket
import subprocess
import sys
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

import service
from stepwise import Progress
from stepwise.cli import app, exits, progress
from tests.local import serving_fake
from tests.programs import done, process, read_terminal, refused, running, stepwise, surroundings
from tests.servers import PATIENCE, Json, ServerProcess, read_npy, read_parameters, read_png, write_npy

PNG, ZIP, NPY = "image/png", "application/zip", "application/x-npy"


def asked(server: ServerProcess, accept: str = PNG, **fields: object) -> bytes:
    """The answer of POST /sample."""
    answer = server.client.post("/sample", json=fields, headers={"Accept": accept})
    assert answer.status_code == 200, answer.text
    return answer.content


def uploaded(server: ServerProcess, path: str, image: bytes, accept: str = PNG, **fields: object) -> bytes:
    """The answer of POST /denoise or /noise."""
    answer = server.client.post(path, data=fields, files={"image": image}, headers={"Accept": accept})
    assert answer.status_code == 200, answer.text
    return answer.content


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def clean(server: ServerProcess, tmp_path: Path) -> bytes:
    """An image, also written to clean.png."""
    image = asked(server, seed=9, class_label="dog")
    (tmp_path / "clean.png").write_bytes(image)
    return image


# Without the server's packages. tests/test_install.py tests a real installation without them.

WITHOUT = """
import sys
sys.modules.update(dict.fromkeys(["torch", "starlette", "fastapi", "uvicorn", "pydantic_settings", "PIL", "cv2"]))
from stepwise.cli import main
for line in sys.argv[1:]:
    sys.argv = ["stepwise", *line.split()]
    try:
        main()
    except SystemExit as ending:
        print(f"{line}: {ending.code}", flush=True)
"""


def without_server(folder: Path, *lines: str) -> tuple[str, str]:
    """The program's standard output and standard error, where no package of the server can be imported."""
    ended = subprocess.run(
        [sys.executable, "-c", WITHOUT, *lines],
        cwd=folder,
        env=surroundings(None),
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=True,
    )
    return ended.stdout, ended.stderr


def test_every_command_shows_its_help_without_what_serves(tmp_path: Path) -> None:
    names = [command.callback.__name__ for command in app.registered_commands if command.callback]
    assert len(names) == 7
    shown, errors = without_server(tmp_path, "--version", *(f"{name} --help" for name in names))
    assert errors == ""
    assert f"stepwise {service.__version__}\n" in shown
    for name in names:
        assert f"{name} --help: 0\n" in shown
    assert "the list of all settings needs the extra `server`" in " ".join(shown.split())


def test_what_needs_the_server_says_so_in_one_line(tmp_path: Path) -> None:
    """The program says so before it draws or writes anything."""
    needing = {
        "serve": "stepwise serve",
        "sample --local": "--local",
        "sample --sheet -o a.png": "--sheet",
        "convert a b": "stepwise convert",
    }
    shown, errors = without_server(tmp_path, *needing)
    assert shown.splitlines() == [f"{line}: {exits.UNUSABLE}" for line in needing]
    for line, what in zip(errors.splitlines(), needing.values(), strict=True):
        assert line.startswith(f"stepwise: {what} needs the extra `server`, and ")
        assert "in a checkout of Stepwise, pip install '.[cpu]'" in line
    assert list(tmp_path.iterdir()) == []


# sample


def test_an_image_is_a_file_named_by_its_seed(server: ServerProcess, tmp_path: Path) -> None:
    """In a new process, in which warnings are errors. Most other tests run the program in their own process."""
    assert done(process(server, tmp_path, "sample", "-c", "cat", "-s", "5")) == "5.png\n"
    assert files(tmp_path) == {"5.png": asked(server, seed=5, class_label="cat")}


def test_images_go_to_a_folder(server: ServerProcess, tmp_path: Path) -> None:
    printed = done(stepwise(server, tmp_path, "sample", "-n", "3", "-s", "5", "--steps", "3", "-o", "new/folder/"))
    assert printed.splitlines() == ["new/folder/5.png", "new/folder/6.png", "new/folder/7.png"]
    alone = {f"new/folder/{seed}.png": asked(server, seed=seed, num_inference_steps=3) for seed in (5, 6, 7)}
    assert files(tmp_path) == alone


def test_the_suffix_chooses_the_format(server: ServerProcess, tmp_path: Path) -> None:
    options = ["sample", "-s", "5", "-n", "3"]
    asked_for = {"seed": 5, "num_images": 3}
    assert done(stepwise(server, tmp_path, *options, "-o", "all.npy")) == "all.npy\n"
    assert (tmp_path / "all.npy").read_bytes() == asked(server, NPY, **asked_for)
    for name, media_type in (("all.webp", "image/webp"), ("all.JPG", "image/jpeg")):
        done(stepwise(server, tmp_path, *options, "--sheet", "-o", name))
        assert (tmp_path / name).read_bytes() == asked(server, media_type, **asked_for)
    told = json.loads(done(stepwise(server, tmp_path, *options, "-o", "all.npy", "--json")))
    assert told == {"images": [{"seed": seed, "file": "all.npy"} for seed in (5, 6, 7)]}


def test_archives_and_sheets_are_the_servers(server: ServerProcess, tmp_path: Path) -> None:
    """Also with several labels and guidance scales, and with a single image."""
    several: Json = {"seed": 5, "num_images": 3, "class_label": ["cat", "7", "dog"], "guidance_interval": [0, 0.5]}
    options = ["sample", "-s", "5", "-c", "cat", "-c", "7", "-c", "dog", "--guidance-interval", "0,0.5"]
    assert done(stepwise(server, tmp_path, *options, "-o", "all.zip")) == "all.zip\n"
    assert done(stepwise(server, tmp_path, *options, "--sheet", "-o", "all.png")) == "all.png\n"
    assert stepwise(server, tmp_path, "sample", "-s", "8", "--sheet", "-o", "-").stdout == asked(server, seed=8)
    assert files(tmp_path) == {
        "all.zip": asked(server, ZIP, **several),
        "all.png": asked(server, **several),
    }


def test_every_option_is_heard(server: ServerProcess, tmp_path: Path) -> None:
    options = ["-n", "2", "-s", "3", "-c", "1", "-g", "3", "--sampler", "ddim", "--eta", "0.5", "--steps", "6"]
    options += ["--guidance-interval", "0.25,1", "--height", "16", "--width", "16", "--guidance-rescale", "0.5"]
    told = json.loads(done(stepwise(server, tmp_path, "sample", *options, "--timeout", "99", "--json", "-o", "a.zip")))
    assert told["images"] == [{"seed": 3, "file": "a.zip"}, {"seed": 4, "file": "a.zip"}]
    assert told["parameters"] == {
        "num_images": 2,
        "seed": 3,
        "class_label": 1,
        "guidance_scale": 3.0,
        "guidance_rescale": 0.5,
        "guidance_interval": [0.25, 1.0],
        "height": 16,
        "width": 16,
        "sampler": "ddim",
        "eta": 0.5,
        "num_inference_steps": 6,
        "timeout_s": 99.0,
        "preview_every": 0,
    }
    assert all(seconds >= 0 for seconds in told["timings"].values())


@pytest.mark.parametrize("listed", [["--timesteps", "900,300"], ["--timesteps", "900", "--timesteps", "300"]])
def test_timesteps_have_commas_between_them_or_are_given_one_by_one(
    server: ServerProcess, tmp_path: Path, listed: list[str]
) -> None:
    done(stepwise(server, tmp_path, "sample", "-s", "5", "-n", "2", *listed, "--sheet", "-o", "a.png"))
    assert (tmp_path / "a.png").read_bytes() == asked(server, seed=5, num_images=2, timesteps=[900, 300])


def test_timesteps_that_are_no_numbers_are_refused_in_one_line(server: ServerProcess, tmp_path: Path) -> None:
    ended = stepwise(server, tmp_path, "sample", "--timesteps", "900,x")
    assert refused(ended, 2) == "--timesteps 900,x: must be numbers with commas between them"


def test_json_names_each_file(server: ServerProcess, tmp_path: Path) -> None:
    told = json.loads(done(stepwise(server, tmp_path, "sample", "-n", "2", "--json", "-o", ".")))
    assert [image["file"] for image in told["images"]] == [f"{image['seed']}.png" for image in told["images"]]
    assert sorted(files(tmp_path)) == sorted(image["file"] for image in told["images"])


def test_files_that_differ_are_not_written_over(server: ServerProcess, tmp_path: Path) -> None:
    """Then no file is written. A file with the same bytes is no obstacle."""
    (tmp_path / "6.png").write_bytes(b"something else")
    options = ["sample", "-n", "2", "-s", "5", "-o", "."]
    line = refused(stepwise(server, tmp_path, *options), exits.UNUSABLE)
    assert line == "6.png is there, and is another image: --force writes over it"
    assert files(tmp_path) == {"6.png": b"something else"}
    for more in (["--force"], []):
        assert done(stepwise(server, tmp_path, *options, *more)) == "5.png\n6.png\n"
    assert files(tmp_path) == {"5.png": asked(server, seed=5), "6.png": asked(server, seed=6)}


def test_nothing_is_drawn_that_could_not_be_written(server: ServerProcess, tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"something else")
    accepted = server.metric("stepwise_accepted_total")
    assert "a.png is there" in refused(stepwise(server, tmp_path, "sample", "-o", "a.png"), exits.UNUSABLE)
    assert server.metric("stepwise_accepted_total") == accepted


def test_what_cannot_be_written_is_told(server: ServerProcess, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    ended = stepwise(server, tmp_path, "sample", "-o", "file/below/")
    assert refused(ended, exits.UNUSABLE) == "file/below: cannot be written: Not a directory"


# denoise and noise


def test_noise_and_back_without_a_thought(server: ServerProcess, tmp_path: Path, clean: bytes) -> None:
    """Both commands name their files, and use the same value range for PNGs."""
    assert done(stepwise(server, tmp_path, "noise", "clean.png", "-t", "400", "-s", "1")) == "clean-noisy.png\n"
    noisy = (tmp_path / "clean-noisy.png").read_bytes()
    assert noisy == uploaded(server, "/noise", clean, timestep=400, seed=1, value_range=4)
    options = ["-t", "400", "--steps", "7", "-c", "dog", "-g", "2", "-s", "3", "--sampler", "ddpm"]
    printed = done(stepwise(server, tmp_path, "denoise", "clean-noisy.png", *options))
    assert printed == "clean-noisy-clean.png\n"
    fields: Json = {"num_inference_steps": 7, "class_label": "dog", "guidance_scale": 2, "seed": 3, "sampler": "ddpm"}
    assert (tmp_path / "clean-noisy-clean.png").read_bytes() == uploaded(
        server, "/denoise", noisy, timestep=400, value_range=4, **fields
    )


def test_an_ordinary_image_is_read_as_one(server: ServerProcess, tmp_path: Path, clean: bytes) -> None:
    """An 8-bit PNG of a camera has values −1 … 1. The option names another range."""
    options = ["denoise", "clean.png", "-t", "30", "-s", "1", "--scaling", "additive"]
    for more, value_range in ([], 1), (["--value-range", "3"], 3):
        done(stepwise(server, tmp_path, *options, *more, "-o", f"{value_range}.png"))
        fields: Json = {"timestep": 30, "seed": 1, "scaling": "additive", "value_range": value_range}
        assert (tmp_path / f"{value_range}.png").read_bytes() == uploaded(server, "/denoise", clean, **fields)


def test_arrays_are_exact(server: ServerProcess, tmp_path: Path, clean: bytes) -> None:
    told = json.loads(done(stepwise(server, tmp_path, "noise", "clean.png", "-t", "400", "-o", "n.npy", "--json")))
    assert told.keys() == {"file", "seed", "clipped"}
    assert (told["file"], told["clipped"]) == ("n.npy", 0)
    noisy = (tmp_path / "n.npy").read_bytes()
    assert noisy == uploaded(server, "/noise", clean, NPY, timestep=400, seed=told["seed"])
    for output in ("x0", "model_output", "previous"):
        options = ["-t", "400", "--output", output, "-s", "2", "-o", f"{output}.npy"]
        done(stepwise(server, tmp_path, "denoise", "n.npy", *options))
        expected = uploaded(server, "/denoise", noisy, NPY, timestep=400, seed=2, output=output)
        assert np.array_equal(read_npy((tmp_path / f"{output}.npy").read_bytes()), read_npy(expected))
    done(stepwise(server, tmp_path, "denoise", "n.npy", "-t", "400", "--output", "previous"))
    assert (tmp_path / "n-previous.npy").exists()


def test_what_is_clipped_is_told(server: ServerProcess, tmp_path: Path, clean: bytes) -> None:
    ended = stepwise(server, tmp_path, "noise", "clean.png", "-t", "900", "-s", "1", "--value-range", "1")
    assert (ended.returncode, ended.stdout) == (0, b"clean-noisy.png\n")
    assert "% of the values are beyond ±1 and were clipped" in ended.stderr.decode()


def test_a_pipe(server: ServerProcess, tmp_path: Path, clean: bytes) -> None:
    """PNGs, and arrays if the first input is an array."""
    array = write_npy((read_png(clean)[None] / np.float32(127.5) - 1).astype(np.float32))
    for image, accept in (clean, PNG), (array, NPY):
        first = stepwise(server, tmp_path, "noise", "-", "-t", "400", "-s", "1", stdin=image)
        second = stepwise(server, tmp_path, "denoise", "-", "-t", "400", "-s", "2", stdin=first.stdout)
        assert (first.returncode, second.returncode) == (0, 0)
        noisy = uploaded(server, "/noise", image, accept, timestep=400, seed=1, value_range=4)
        assert first.stdout == noisy
        assert second.stdout == uploaded(server, "/denoise", noisy, timestep=400, seed=2, value_range=4)


def test_an_image_that_is_not_there(server: ServerProcess, tmp_path: Path) -> None:
    line = refused(stepwise(server, tmp_path, "denoise", "no.png", "-t", "4"), exits.UNUSABLE)
    assert line == "no.png: cannot be read: No such file or directory"


# info


def test_info(server: ServerProcess, tmp_path: Path) -> None:
    document = server.client.get("/info").json()
    assert json.loads(done(stepwise(server, tmp_path, "info", "--json"))).keys() == document.keys()
    rows = dict(line.split("  ", 1) for line in done(stepwise(server, tmp_path, "info")).splitlines())
    shown: Json = {name: value.strip() for name, value in rows.items()}
    assert shown["model"] == f"grey: diffusion_unet, {document['model']['num_parameters']:,} parameters"
    assert shown["images"] == "16x16, grey"
    assert shown["classes"] == "cat, dog, 7"
    assert shown["recommended"] == "dpmpp_2m, 4 steps, guidance scale 2"
    assert shown["a request"] == "at most 64 images, 300 s"
    assert shown["fingerprint"] == document["fingerprint"]
    assert shown["a step takes"].endswith(" ms of 4 images")
    assert "first stage" not in shown


# Exit codes.

UNUSABLE = [
    (["sample", "-n", "2", "-o", "-"], "-o - is one place, for 2 images: name a folder (-o sevens/)"),
    (["sample", "-n", "2", "-o", "a.png"], "or put them on one sheet (--sheet)"),
    (
        ["sample", "-o", "a.gif"],
        "-o a.gif: a file must end in .png or .zip or .webp or .jpg or .jpeg or .npy, a folder",
    ),
    (["sample", "-n", "2", "-o", "a.webp"], "or put them on one sheet (--sheet)"),
    (["sample", "--sheet", "-o", "a.npy"], "--sheet is one .png"),
    (["sample", "--sheet"], "--sheet is one .png"),
    (["sample", "--sheet", "-o", "a.zip"], "--sheet is one .png"),
    (["sample", "--json", "-o", "-"], "--json and the image cannot both go to standard output"),
    (["sample", "--weights", "digits"], "--weights digits is for --local"),
    (["sample", "--url", "nowhere"], "--url nowhere: "),
    (["denoise", "a.png", "-t", "1", "--output", "previous", "-o", "b.png"], "--output previous is no image"),
    (["noise", "a.png", "-t", "1", "-o", "b.zip"], "-o b.zip: a file must end in .png or .npy"),
]


@pytest.mark.parametrize(("arguments", "said"), UNUSABLE)
def test_what_cannot_be_meant_is_told(arguments: list[str], said: str) -> None:
    ended = CliRunner().invoke(app, arguments)
    assert ended.exit_code == exits.UNUSABLE
    assert ended.stderr.startswith("stepwise: ")
    assert said in ended.stderr


@pytest.mark.parametrize(
    "arguments",
    [["draw"], ["sample", "--api-key", "k"], ["sample", "-n", "many"], ["noise"], ["denoise", "a.png"], ["verify"]],
)
def test_usage_errors(arguments: list[str]) -> None:
    ended = CliRunner().invoke(app, arguments)
    assert ended.exit_code == exits.UNUSABLE
    assert "Usage: " in ended.stderr


def test_help_names_every_exit_code() -> None:
    ended = CliRunner().invoke(app, ["--help"])
    assert ended.exit_code == 0
    text = " ".join(ended.stdout.split())
    for code, meaning in exits.MEANINGS.items():
        assert f"{code}, {meaning}" in text
    for command in ("serve", "sample", "denoise", "noise", "verify", "info", "convert"):
        assert f" {command} " in text


def test_help_shows_brackets() -> None:
    assert "[word]" in CliRunner().invoke(app, ["sample", "--help"]).stdout


def test_version() -> None:
    assert CliRunner().invoke(app, ["--version"]).stdout == f"stepwise {service.__version__}\n"


def test_a_field_that_the_server_refuses(server: ServerProcess, tmp_path: Path) -> None:
    ended = stepwise(server, tmp_path, "sample", "-c", "cow")
    assert refused(ended, exits.UNUSABLE) == "class_label: must be 0 to 2, or one of cat, dog, 7, and is 'cow'"
    assert files(tmp_path) == {}


def test_no_server(tmp_path: Path) -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{closed.getsockname()[1]}"
        line = refused(stepwise(None, tmp_path, "sample", "--url", url), exits.UNREACHABLE)
    assert line.startswith(f"no connection to {url}: ")
    assert line.endswith("; start one with `stepwise serve`, or do without: --local")


def test_the_key_is_in_the_environment(strict_server: ServerProcess, tmp_path: Path) -> None:
    ended = stepwise(strict_server, tmp_path, "info", "--json", STEPWISE_API_KEY="alpha")
    assert json.loads(done(ended))["model"]["name"] == "poisoned"
    assert "API key" in refused(stepwise(strict_server, tmp_path, "info"), exits.REFUSED)


def test_a_computation_that_fails(strict_server: ServerProcess, tmp_path: Path) -> None:
    options = ["sample", "-c", "dog", "--url", strict_server.url]
    assert refused(stepwise(None, tmp_path, *options, STEPWISE_API_KEY="alpha"), exits.REFUSED)
    assert files(tmp_path) == {}


def test_a_busy_server_is_asked_for_as_long_as_there_is_patience(tmp_path: Path) -> None:
    with serving_fake(max_queue=1) as local, ThreadPoolExecutor(2) as pool:
        local.runner.hold()
        first = pool.submit(local.client.post, "/sample", json={"seed": 1})
        local.wait_for_metric("stepwise_accepted_total", lambda count: count == 1)
        refused(stepwise(local, tmp_path, "sample", "--patience", "0"), exits.REFUSED)

        def let_go_once_asked_twice() -> None:
            local.wait_for_metric("stepwise_refused_total", lambda count: count > 1, reason="full")
            local.runner.let_go()

        letting_go = pool.submit(let_go_once_asked_twice)
        assert done(stepwise(local, tmp_path, "sample", "-s", "2")) == "2.png\n"
        letting_go.result()
        assert first.result().status_code == 200
    assert files(tmp_path).keys() == {"2.png"}


@pytest.mark.parametrize("number", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)])
def test_a_signal_cancels_the_work(tmp_path: Path, number: signal.Signals) -> None:
    with serving_fake() as local:
        local.runner.hold()
        with running(local, tmp_path, "sample", "--steps", "9") as program:
            local.wait_for_metric("stepwise_accepted_total", lambda count: count == 1)
            program.send_signal(number)
            _, errors = program.communicate(timeout=PATIENCE)
        local.wait_for_metric("stepwise_cancelled_total", lambda count: count == 1, reason="disconnect")
    assert program.returncode == {signal.SIGINT: exits.INTERRUPTED, signal.SIGTERM: -signal.SIGTERM}[number]
    assert b"Traceback" not in errors
    assert files(tmp_path) == {}


def test_a_reader_that_leaves(server: ServerProcess, tmp_path: Path) -> None:
    read, written = os.pipe()
    os.close(read)
    with os.fdopen(written, "wb") as pipe, running(server, tmp_path, "sample", "-o", "-", stdout=pipe) as program:
        assert program.stderr
        assert program.stderr.read() == b""
    assert program.returncode == exits.READER_LEFT


# Terminals.


def test_progress_is_shown_on_a_terminal(tmp_path: Path) -> None:
    with serving_fake() as local:
        local.runner.hold()
        terminal, written = pty.openpty()
        with running(local, tmp_path, "sample", "-s", "1", "--steps", "3", stderr=written, TERM="xterm") as program:
            os.close(written)
            for _ in range(2):  # the first pass has ended, the second is held
                local.runner.next_pass()
            seen = ""
            while "step 1 of 3, 2.0 s left" not in seen:
                seen += os.read(terminal, 65536).decode(errors="replace")
            local.runner.let_go()
            seen += read_terminal(terminal)
            assert program.stdout
            assert program.stdout.read() == b"1.png\n"
        os.close(terminal)
    assert program.returncode == 0


@pytest.mark.parametrize(
    ("taken", "words"),
    [
        (Progress(3, 9, 1.0, 0, 1, 0.4), "step 3 of 9"),
        (Progress(0, 50, 1.0, 28, 40, 0.7), "28 of 40 images"),
        (Progress(3, 9, 1.0, None, None, 1 / 3), "step 3 of 9"),  # of a server that does not tell
    ],
)
def test_progress_counts_images_where_there_are_several(taken: Progress, words: str) -> None:
    assert progress.how_far(taken) == words


def test_no_image_goes_to_a_terminal(server: ServerProcess, tmp_path: Path) -> None:
    terminal, written = pty.openpty()
    with running(server, tmp_path, "sample", "-o", "-", stdout=written) as program:
        os.close(written)
        assert read_terminal(terminal) == ""
        assert program.stderr
        assert b"would write an image to this terminal" in program.stderr.read()
    os.close(terminal)
    assert program.returncode == exits.UNUSABLE


# Imports.

IMPORTS = """
import contextlib, io, json, sys
from stepwise.cli import app
for arguments in json.loads(sys.argv[1]):
    with contextlib.redirect_stdout(io.StringIO()) as printed, contextlib.suppress(SystemExit):
        app(arguments)
    assert printed.getvalue(), arguments
large = {"torch", "model", "fastapi", "cv2"} & sys.modules.keys()
print(*sorted(large), *sorted(name for name in sys.modules if name.startswith("service")))
"""


def test_help_and_asking_a_server_import_little(server: ServerProcess, tmp_path: Path, clean: bytes) -> None:
    helps = [["--help"], ["sample", "--help"], ["convert", "--help"]]
    asking = [["sample", "-s", "1"], ["info"], ["noise", "clean.png", "-t", "4"]]
    command = [sys.executable, "-c", IMPORTS, json.dumps(helps + asking)]
    env = surroundings(server)
    ended = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, timeout=PATIENCE, check=False)
    told = (ended.stdout.decode(), ended.stderr.decode(), ended.returncode)
    assert told == ("service service.plan service.plan.entries service.plan.fields service.plan.shared_fields\n", "", 0)
    assert files(tmp_path).keys() == {"clean.png", "1.png", "clean-noisy.png"}


def test_the_archive_has_the_images(server: ServerProcess, tmp_path: Path) -> None:
    """Also for seeds that the server draws."""
    done(stepwise(server, tmp_path, "sample", "-n", "2", "-o", "a.zip"))
    with zipfile.ZipFile(io.BytesIO((tmp_path / "a.zip").read_bytes())) as archive:
        recipes = [read_parameters(archive.read(name)) for name in archive.namelist()]
    assert recipes[1]["seed"] == recipes[0]["seed"] + 1


def test_a_model_without_text_refuses_prompts(server: ServerProcess, tmp_path: Path) -> None:
    line = refused(stepwise(server, tmp_path, "sample", "a fox", "-o", "a.png"), exits.UNUSABLE)
    assert line.startswith("prompt: must be null: this model has no text; a class_label says what it draws")
    line = refused(stepwise(server, tmp_path, "sample", "--negative", "blurry", "-o", "a.png"), exits.UNUSABLE)
    assert line.startswith("negative_prompt: must be null: this model has no text")
