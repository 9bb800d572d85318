"""Settings come from the environment, are checked once, and never change."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest
from platformdirs import user_cache_path
from pydantic import SecretStr, ValidationError

from model.backends import cgroups
from model.rows import Group
from service import config
from service.config import PREFIX, Settings, SettingsError, available_cores
from service.plan.recommended import Wanted

# The settings of API.md and the later ones: name, default.
TABLE: dict[str, object] = {
    "WEIGHTS": "digits",  # the weights in the box
    "HOST": "127.0.0.1",
    "PORT": 8000,
    "SIZES": (),  # the size that the weights were trained for
    "RECOMMENDED": None,  # the weights' files tell
    "RECIPE_PROMPTS": True,
    "DEVICE": "auto",
    "PRECISION": "auto",
    "THREADS": None,  # the cores that this process may use
    "MAX_BATCH": None,  # depends on the device
    "MAX_IMAGES": 64,
    "MAX_QUEUE": 256,
    "MAX_BODY": 16 * 1024 * 1024,
    "TIMEOUT": 300.0,
    "DRAIN_TIMEOUT": 30.0,
    "KEEP_ALIVE": 75.0,
    "API_KEYS": (),
    "PUBLIC_METRICS": False,
    "ALLOW_PICKLE": False,
    "CACHE_DIR": user_cache_path("stepwise"),
    "METRICS_PORT": None,
    "CORS_ORIGINS": (),
    "ROOT_PATH": "",
    "FORWARDED_ALLOW_IPS": None,
    "CHECK": None,
}

SetEnvironment = Callable[..., None]


@pytest.fixture(autouse=True)
def set_environment(monkeypatch: pytest.MonkeyPatch) -> SetEnvironment:
    """A function that adds settings to an environment without any."""
    for name in os.environ:
        if name.upper().startswith(PREFIX):
            monkeypatch.delenv(name)

    def add(**values: str) -> None:
        for name, value in values.items():
            monkeypatch.setenv(PREFIX + name, value)

    return add


def value_of(settings: Settings, name: str) -> object:
    return getattr(settings, name.lower())


def test_settings_and_their_defaults_are_those_of_the_contract() -> None:
    settings = config.read()
    assert {name.upper(): value for name, value in settings.model_dump().items()} == TABLE


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        ("WEIGHTS", "/models/faces", "/models/faces"),
        ("HOST", "0.0.0.0", "0.0.0.0"),
        ("PORT", "9000", 9000),
        ("PORT", "0", 0),
        ("SIZES", "32x32", (Group(32, 32),)),
        ("SIZES", "64x48, 32x32 ,8x10000", (Group(48, 64), Group(32, 32), Group(10000, 8))),
        ("RECOMMENDED", "sampler=euler,steps=4,guidance=0", Wanted("euler", 4, 0.0)),
        ("RECIPE_PROMPTS", "0", False),
        ("DEVICE", "cpu", "cpu"),
        ("DEVICE", "cuda", "cuda"),
        ("DEVICE", "cuda:1", "cuda:1"),
        ("PRECISION", "float32", "float32"),
        ("PRECISION", "bfloat16", "bfloat16"),
        ("THREADS", "3", 3),
        ("MAX_BATCH", "16", 16),
        ("MAX_IMAGES", "5", 5),
        ("MAX_QUEUE", "1", 1),
        ("MAX_BODY", "1000", 1000),
        ("MAX_BODY", "2MiB", 2 * 2**20),
        ("TIMEOUT", "0.5", 0.5),
        ("DRAIN_TIMEOUT", "0", 0.0),
        ("KEEP_ALIVE", "620", 620.0),
        ("API_KEYS", "one, two,", (SecretStr("one"), SecretStr("two"))),
        ("ALLOW_PICKLE", "1", True),
        ("ALLOW_PICKLE", "0", False),
        ("CACHE_DIR", "/var/cache/stepwise", Path("/var/cache/stepwise")),
        ("CACHE_DIR", "~/models", Path.home() / "models"),
        ("METRICS_PORT", "9090", 9090),
        ("METRICS_PORT", "0", 0),
        ("CORS_ORIGINS", "https://a.example,https://b.example", ("https://a.example", "https://b.example")),
        ("CORS_ORIGINS", "*", ("*",)),
        ("ROOT_PATH", "/draw", "/draw"),
        ("ROOT_PATH", "/draw/all%20day/", "/draw/all%20day/"),
        ("ROOT_PATH", "/", "/"),
        ("FORWARDED_ALLOW_IPS", "10.0.0.1,10.0.0.2", "10.0.0.1,10.0.0.2"),
    ],
)
def test_a_setting_is_read_from_the_environment(
    set_environment: SetEnvironment, name: str, text: str, value: object
) -> None:
    set_environment(**{name: text})
    assert value_of(config.read(), name) == value


@pytest.mark.parametrize("name", TABLE)
def test_an_empty_setting_is_the_default(set_environment: SetEnvironment, name: str) -> None:
    set_environment(**{name: ""})
    assert value_of(config.read(), name) == TABLE[name]


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("PORT", "http"),
        ("PORT", "65536"),
        ("PORT", "-1"),
        ("SIZES", "32"),
        ("SIZES", "0x32"),
        ("SIZES", "32x032"),
        ("SIZES", "32x-8"),
        ("SIZES", "32x100000"),
        ("SIZES", "32X32"),
        ("SIZES", "32x32,"),
        ("SIZES", "32x32;64x64"),
        ("SIZES", "32x32,64x64,32x32"),
        ("RECOMMENDED", "euler"),
        ("RECOMMENDED", "steps=4,steps=5"),
        ("RECIPE_PROMPTS", "perhaps"),
        ("DEVICE", "gpu"),
        ("DEVICE", "cuda:"),
        ("DEVICE", "cpu:0"),
        ("PRECISION", "float16"),
        ("THREADS", "0"),
        ("THREADS", "1.5"),
        ("MAX_BATCH", "0"),
        ("MAX_BATCH", "many"),
        ("MAX_IMAGES", "0"),
        ("MAX_QUEUE", "0"),
        ("MAX_BODY", "0"),
        ("MAX_BODY", "16 loaves"),
        ("TIMEOUT", "0"),
        ("TIMEOUT", "inf"),
        ("TIMEOUT", "nan"),
        ("DRAIN_TIMEOUT", "-1"),
        ("DRAIN_TIMEOUT", "inf"),
        ("DRAIN_TIMEOUT", "1e300"),
        ("TIMEOUT", "1e300"),
        ("METRICS_PORT", "65536"),
        ("METRICS_PORT", "metrics"),
        ("ROOT_PATH", "draw"),
        ("ROOT_PATH", "//other.example"),
        ("ROOT_PATH", "/dräw"),
        ("ROOT_PATH", "/draw?x"),
        ("CACHE_DIR", "~nobody-at-all/cache"),
        ("KEEP_ALIVE", "0"),
        ("KEEP_ALIVE", "inf"),
        ("ALLOW_PICKLE", "perhaps"),
    ],
)
def test_a_setting_that_cannot_be_used_is_named_with_its_value(
    set_environment: SetEnvironment, name: str, text: str
) -> None:
    set_environment(**{name: text})
    with pytest.raises(SettingsError) as error:
        config.read()
    assert str(error.value).startswith(f"STEPWISE_{name}={text}: ")
    assert "\n" not in str(error.value)


def test_a_wrong_size_is_told_among_many(set_environment: SetEnvironment) -> None:
    set_environment(SIZES="32x32, 64*64")
    said = r"must be sizes as 64x48, width x height, with commas between them; '64\*64' is none$"
    with pytest.raises(SettingsError, match=said):
        config.read()
    set_environment(SIZES="64x32,32x32,64x32")
    with pytest.raises(SettingsError, match=r"must name each size once, and names 64x32 twice$"):
        config.read()


def test_a_value_of_several_lines_is_told_on_one(set_environment: SetEnvironment) -> None:
    set_environment(PORT="80\n00")
    with pytest.raises(SettingsError, match=r"^STEPWISE_PORT=80 00: "):
        config.read()


def test_all_settings_that_cannot_be_used_are_named(set_environment: SetEnvironment) -> None:
    set_environment(PORT="http", MAX_IMAGES="0", HOST="::1")
    with pytest.raises(SettingsError, match=r"^STEPWISE_PORT=http: .*; STEPWISE_MAX_IMAGES=0: [^;]*$"):
        config.read()


def test_keys_are_not_shown(set_environment: SetEnvironment) -> None:
    set_environment(API_KEYS="open-sesame")
    settings = config.read()
    assert "sesame" not in repr(settings) + str(settings.model_dump())
    assert [key.get_secret_value() for key in settings.api_keys] == ["open-sesame"]


@pytest.mark.parametrize("name", TABLE)
def test_settings_are_frozen(name: str) -> None:
    settings = config.read()
    with pytest.raises(ValidationError, match="frozen"):
        setattr(settings, name.lower(), TABLE[name])


def test_names_that_are_no_settings_are_found(set_environment: SetEnvironment) -> None:
    assert config.unknown() == []
    set_environment(PORT="1", WIEGHTS="digits", BATCH="3")
    assert config.unknown() == ["STEPWISE_BATCH", "STEPWISE_WIEGHTS"]
    assert config.read().port == 1


def test_settings_that_are_not_built_yet_have_no_effect_and_are_no_mistake(set_environment: SetEnvironment) -> None:
    assert config.without_effect() == []
    names = ["EMBEDDINGS", "LOG_LEVEL", "LORA", "TINY_VAE"]
    set_environment(**dict.fromkeys(names, "x"), PORT="1")
    assert config.without_effect() == [f"STEPWISE_{name}" for name in names]
    assert config.unknown() == []
    config.refuse_open()
    assert config.read().port == 1


# Keys and checks fail closed


@pytest.mark.parametrize("keys", ["", " ", ",", " , ,", "\n", "\t,"])
@pytest.mark.parametrize("name", ["STEPWISE_API_KEYS", "stepwise_api_keys", "Stepwise_Api_Keys"])
def test_keys_that_are_set_and_empty_are_refused(name: str, keys: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """From an empty Secret, or from `${STEPWISE_API_KEYS:-}`."""
    monkeypatch.setenv(name, keys)
    with pytest.raises(SettingsError, match=r"^STEPWISE_API_KEYS is set, but holds no key, .*, do not set it$"):
        config.refuse_open()


@pytest.mark.parametrize(
    "name",
    ["API_KEY", "APIKEY", "APIKEYS", "KEY", "KEYS", "API_KEYS_FILE", "api_key", "TOKEN", "API_TOKENS", "AUTH_KEYS"],
)
def test_a_name_that_looks_like_a_misspelt_one_is_refused_without_its_value(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(f"STEPWISE_{name}", "open-sesame")
    for keys in ({}, {"STEPWISE_API_KEYS": "alpha"}):
        for key, value in keys.items():
            monkeypatch.setenv(key, value)
        with pytest.raises(SettingsError, match=rf"^STEPWISE_{name.upper()} is ") as error:
            config.refuse_open()
        assert "STEPWISE_API_KEYS" in str(error.value)
        assert "sesame" not in str(error.value)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["STEPWISE_CHECK", "stepwise_check"])
def test_a_check_that_is_set_and_empty_is_refused(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, "")
    with pytest.raises(SettingsError, match=r"^STEPWISE_CHECK is set, but names no function, .*, do not set it$"):
        config.refuse_open()


@pytest.mark.parametrize("name", ["CHECKS", "SAFETY_CHECKER", "SAFETY", "MODERATION", "CHECK_IMAGES", "my_check"])
def test_a_name_that_looks_like_a_misspelt_check_is_refused(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(f"STEPWISE_{name}", "my_checks:check")
    with pytest.raises(SettingsError, match=rf"^STEPWISE_{name.upper()} is no .* misspelt STEPWISE_CHECK; "):
        config.refuse_open()


@pytest.mark.parametrize(
    "value", [" ", "my_checks", "my_checks:", ":check", "a b:c", "a:b:c", "a.:b", "a:b.c", "1a:b", "a:b()"]
)
def test_a_check_must_name_a_function(value: str, set_environment: SetEnvironment) -> None:
    set_environment(CHECK=value)
    with pytest.raises(SettingsError, match=r"^STEPWISE_CHECK=.*: must name a function of Python, as my_checks:check$"):
        config.read()


@pytest.mark.parametrize("value", ["my_checks:check", "ours.checks_2.of:ob", "_a:_b"])
def test_functions_that_check(value: str, set_environment: SetEnvironment) -> None:
    set_environment(CHECK=value, CHECKPOINT="x")
    config.refuse_open()
    assert config.read().check == value


def test_a_setting_of_recipes_that_is_set_and_empty_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """From `${STEPWISE_RECIPE_PROMPTS:-}`."""
    monkeypatch.setenv("STEPWISE_RECIPE_PROMPTS", "")
    with pytest.raises(SettingsError, match=r"^STEPWISE_RECIPE_PROMPTS is set, but is empty, .*, or do not set it$"):
        config.refuse_open()


@pytest.mark.parametrize("name", ["RECIPE_PROMPT", "RECIPES_PROMPTS", "PROMPTS", "NO_PROMPTS", "recipe_prompts_"])
def test_a_misspelt_name_puts_no_prompts_into_recipes(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(f"STEPWISE_{name}", "0")
    with pytest.raises(SettingsError, match=rf"^STEPWISE_{name.upper()} .* a misspelt STEPWISE_RECIPE_PROMPTS; "):
        config.refuse_open()


def test_keys_and_no_keys_are_no_mistake(set_environment: SetEnvironment) -> None:
    config.refuse_open()
    set_environment(API_KEYS="alpha,", WIEGHTS="digits", KEEP_ALIVE="3", API_SERVICE_HOST="10.0.0.1")
    config.refuse_open()


@pytest.mark.parametrize(
    ("name", "default"),
    [
        ("WEIGHTS", "digits"),
        ("HOST", "127.0.0.1"),
        ("PORT", "8000"),
        ("DEVICE", "auto"),
        ("PRECISION", "auto"),
        ("RECOMMENDED", "what the weights' files tell"),
        ("RECIPE_PROMPTS", "1"),
        ("THREADS", "the cores that this process may use"),
        ("MAX_BATCH", "32 on CUDA; on the CPU 1 to 16, fewer for larger networks"),
        ("MAX_IMAGES", "64"),
        ("MAX_QUEUE", "256"),
        ("MAX_BODY", "16 MiB"),
        ("TIMEOUT", "300"),
        ("DRAIN_TIMEOUT", "30"),
        ("KEEP_ALIVE", "75"),
        ("API_KEYS", "none"),
        ("PUBLIC_METRICS", "0"),
        ("ALLOW_PICKLE", "0"),
        ("CACHE_DIR", "stepwise in the user's cache folder"),
        ("METRICS_PORT", "none"),
        ("CORS_ORIGINS", "none"),
        ("ROOT_PATH", "none"),
        ("FORWARDED_ALLOW_IPS", "none"),
    ],
)
def test_usage_names_every_setting_and_its_default(name: str, default: str) -> None:
    entries = config.usage().split(f"  {PREFIX}")[1:]
    assert len(entries) == len(TABLE)
    [entry] = [" ".join(entry.split()) for entry in entries if entry.split()[0] == name]
    assert entry.removesuffix(")").endswith(f"default: {default}")
    assert entry.count("default") == 1
    assert len(entry) > len(f"{name} (default: {default})")  # it has a description too


def test_usage_is_a_table_that_fits_a_terminal() -> None:
    for line in config.usage().splitlines():
        assert len(line) <= 100
        assert line[30] == " "
        assert line[31] != " "


# Cores


@pytest.mark.parametrize(("quota", "cores"), [(None, 4), (0.25, 1), (1.0, 1), (2.1, 3), (3.0, 3), (64.0, 4)])
def test_cores_are_those_of_the_affinity_within_the_quota(
    monkeypatch: pytest.MonkeyPatch, quota: float | None, cores: int
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 2, 5, 7}, raising=False)
    monkeypatch.setattr(cgroups, "cores", lambda: quota)
    assert available_cores() == cores


def test_there_is_at_least_one_core_and_no_more_than_the_machine_has() -> None:
    assert 1 <= available_cores() <= (os.cpu_count() or 1)
