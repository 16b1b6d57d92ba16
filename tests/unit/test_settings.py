"""Settings from the environment."""

from __future__ import annotations

import os

import pytest
from pydantic import SecretStr, ValidationError

from unisono.config import (
    SettingError,
    Settings,
    configured_backends,
    idle_settings,
    parse_backends,
    wrong_settings,
)
from unisono.setting_kinds import parse_address


@pytest.mark.parametrize("name", ["UNISONO_MEMORY_FACTOR", "OLLAMA_BATCH_MEMORY_FACTOR"])
def test_the_memory_factor_has_two_names(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Ours goes first; the field's own name serves programs, and is no variable."""
    assert Settings().memory_factor == 1.0
    monkeypatch.setenv(name, "0.5")
    assert Settings().memory_factor == 0.5
    assert Settings(memory_factor=0.25).memory_factor == 0.25
    monkeypatch.setenv("UNISONO_MEMORY_FACTOR", "0.75")
    assert Settings().memory_factor == 0.75


def test_a_variable_without_our_prefix_is_none_of_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    """MEMORY_FACTOR may be anybody's."""
    monkeypatch.setenv("MEMORY_FACTOR", "0.5")
    assert Settings().memory_factor == 1.0


@pytest.mark.parametrize("value", ["0", "-1", "1.01", "nan", "half"])
def test_a_memory_factor_that_is_none(monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    """It is a share: above 0, up to 1."""
    monkeypatch.setenv("UNISONO_MEMORY_FACTOR", value)
    with pytest.raises(ValidationError):
        Settings()


def test_the_memory_limit_is_a_size(monkeypatch: pytest.MonkeyPatch) -> None:
    """Unset, it is not known."""
    assert Settings().memory_limit is None
    monkeypatch.setenv("UNISONO_MEMORY_LIMIT", "20GiB")
    assert Settings().memory_limit == 20 * 1024**3
    monkeypatch.setenv("UNISONO_MEMORY_LIMIT", "0")
    with pytest.raises(ValidationError):
        Settings()


def test_others_get_a_moment_every_five_minutes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Or as often as is wanted; 0 is never."""
    assert Settings().yield_every == 300.0
    for written, seconds in (("90s", 90.0), ("0", 0.0)):
        monkeypatch.setenv("UNISONO_YIELD_EVERY", written)
        assert Settings().yield_every == seconds
    monkeypatch.setenv("UNISONO_YIELD_EVERY", "-1s")
    with pytest.raises(ValidationError):
        Settings()


@pytest.mark.parametrize(
    ("written", "address"),
    [
        ("127.0.0.1:9464", ("127.0.0.1", 9464)),
        ("[::1]:0", ("::1", 0)),
        ("0.0.0.0:9464", ("0.0.0.0", 9464)),
        ("metrics.local:80", ("metrics.local", 80)),
        ("none", None),
        (" None ", None),
    ],
)
def test_metrics_are_served_at_an_address(
    monkeypatch: pytest.MonkeyPatch, written: str, address: tuple[str, int] | None
) -> None:
    """On loopback unless it is said; or nowhere."""
    assert parse_address(Settings().metrics_listen) == ("127.0.0.1", 9464)
    monkeypatch.setenv("UNISONO_METRICS_LISTEN", written)
    assert parse_address(Settings().metrics_listen) == address


def test_openai_s_api_is_served_on_loopback(monkeypatch: pytest.MonkeyPatch) -> None:
    """Unless it is said; or nowhere."""
    assert parse_address(Settings().http_listen) == ("127.0.0.1", 4080)
    monkeypatch.setenv("UNISONO_HTTP_LISTEN", "[::1]:80")
    assert parse_address(Settings().http_listen) == ("::1", 80)
    monkeypatch.setenv("UNISONO_HTTP_LISTEN", "none")
    assert parse_address(Settings().http_listen) is None


# -- What is wrong -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("variable", "value", "says"),
    [
        ("UNISONO_MEMORY_FACTOR", "abc", "is 'abc'; it must be a number, above 0 and up to 1"),
        ("OLLAMA_BATCH_MEMORY_FACTOR", "nan", "is 'nan'; it must be a number, above 0 and up to 1"),
        ("UNISONO_SLOTS", "5000", "is '5000'; it must be a whole number, 1 to 4096"),
        ("OLLAMA_BATCH_SIZE", "1.5", "is '1.5'; it must be a whole number, 1 or more"),
        ("UNISONO_EMBEDDED", "maybe", "is 'maybe'; it must be true or false"),
        ("UNISONO_LOG_LEVEL", "loud", "is 'loud'; it must be debug, info, warning or error"),
        ("UNISONO_STALL_TIMEOUT", "0s", "is '0s'; it must be a duration like 500ms, 30s or 1h30m, above 0"),
        ("UNISONO_LOAD_TIMEOUT", "soon", ": 'soon' is not a duration: write it as 500ms, 30s, 10m or 1h30m"),
        ("UNISONO_METRICS_LISTEN", ":9464", ": ':9464' is not an address: write HOST:PORT, or none"),
        ("UNISONO_HTTP_LISTEN", "4080", ": '4080' is not an address: write HOST:PORT, or none"),
        ("UNISONO_METRICS_LISTEN", "9464", ": '9464' is not an address: write HOST:PORT, or none"),
        ("UNISONO_METRICS_LISTEN", "::1:9464", ": '::1:9464' is not an address: write HOST:PORT, or none"),
        ("UNISONO_METRICS_LISTEN", "here:70000", ": 'here:70000' is not an address: write HOST:PORT, or none"),
        ("UNISONO_MEMORY_LIMIT", "0", "is '0'; it must be a size like 4MiB, 512kB or a number of bytes, 1 or more"),
        ("UNISONO_MEMORY_LIMIT", "much", ": 'much' is not a size: write 4MiB, 512kB or a number of bytes"),
        (
            "UNISONO_MAX_JOURNAL_BYTES",
            "1kB",
            "is '1kB'; it must be a size like 4MiB, 512kB or a number of bytes, 1024",
        ),
    ],
)
def test_a_wrong_setting_is_told_in_our_words(
    monkeypatch: pytest.MonkeyPatch, variable: str, value: str, says: str
) -> None:
    """The variable as it is set, its value as it stands there, and what it must be."""
    monkeypatch.setenv(variable, value)
    with pytest.raises(ValidationError) as caught:
        Settings()
    (line,) = wrong_settings(caught.value, os.environ)
    assert line.startswith(f"{variable}{says if says.startswith(':') else f' {says}'}")
    assert "nput should" not in line


def test_all_that_is_wrong_is_told() -> None:
    """Each in a line of its own; what a program gives is called by its variable too. Lists are not repeated."""
    with pytest.raises(ValidationError) as caught:
        Settings(slots=0, log_level="loud", backends=[{"url": "http://user:secret@there"}])  # type: ignore[arg-type]
    lines = wrong_settings(caught.value, {})
    assert "UNISONO_SLOTS is 0; it must be a whole number, 1 to 4096" in lines
    assert "UNISONO_LOG_LEVEL is 'loud'; it must be debug, info, warning or error" in lines
    assert any(line.startswith("UNISONO_BACKENDS is not") for line in lines)
    assert "secret" not in str(lines)


# -- A token -----------------------------------------------------------------------------------------------------


def test_a_token_is_taken_without_what_a_file_of_secrets_has_around_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """A newline at its end would be an illegal header, and an error that repeats it."""
    monkeypatch.setenv("UNISONO_BACKEND_TOKEN", " s3cret\r\n")
    (one,) = configured_backends(Settings(), {})
    assert one.token.get_secret_value() == "s3cret"
    several = Settings(backends="a=http://x")  # type: ignore[arg-type]  # as it is written
    (one,) = configured_backends(several, {"UNISONO_BACKEND_TOKEN_A": "s3cret\n"})
    assert one.token.get_secret_value() == "s3cret"


@pytest.mark.parametrize("value", ["s3\ncret", "s3\x00cret", "s3\tcret", "s3cré", "s3\udce9cret", "s3cret\x7f"])
def test_a_token_that_no_header_can_hold(monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    """The setting is named, and its value is not."""
    says = "has a character that cannot stand in an HTTP header: take out all but printable ASCII"
    several = Settings(backends="a=http://x")  # type: ignore[arg-type]  # as it is written
    with pytest.raises(SettingError) as told:
        configured_backends(several, {"UNISONO_BACKEND_TOKEN_A": value})
    assert str(told.value) == f"UNISONO_BACKEND_TOKEN_A: {says}"
    with pytest.raises(ValidationError) as caught:
        Settings(backend_token=SecretStr(value))
    assert wrong_settings(caught.value, {}) == [f"UNISONO_BACKEND_TOKEN: {says}"]
    assert "s3" not in str(caught.value)


# -- Where it listens --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", ["127.0.0.1:0", "[::1]:50051", "gpu-box:65535", " 0.0.0.0:1 ", "unix:/tmp/u.sock"])
def test_where_it_can_listen(value: str) -> None:
    """A host and a port, or a Unix socket."""
    assert Settings(listen=value).listen == value.strip()


@pytest.mark.parametrize(
    "value", ["nonsense", "127.0.0.1", "50051", ":50051", "::1:50051", "h:99999", "h:-1", "h:1x"]
)
def test_where_it_cannot_listen(monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    """A port beyond the highest would be another one."""
    monkeypatch.setenv("UNISONO_LISTEN", value)
    with pytest.raises(ValidationError) as caught:
        Settings()
    (line,) = wrong_settings(caught.value, os.environ)
    assert line.startswith(f"UNISONO_LISTEN: {value!r} is not HOST:PORT, like 127.0.0.1:50051")


# -- What does nothing -------------------------------------------------------------------------------------------


def test_a_variable_that_is_empty_is_as_if_it_were_not_set(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compose files make such; the other name of a setting counts then."""
    usual = Settings()
    for name in Settings.model_fields:
        monkeypatch.setenv(f"UNISONO_{name.upper()}", "")
    for name in ("BATCH_ENABLED", "BATCH_SIZE", "BATCH_TIMEOUT", "BATCH_MEMORY_FACTOR"):
        monkeypatch.setenv(f"OLLAMA_{name}", "")
    assert Settings() == usual.model_copy(update={"state_dir": "", "data_dir": ""})
    assert idle_settings(Settings(), os.environ) == []
    several = Settings(backends="a=http://x")  # type: ignore[arg-type]  # as it is written
    assert configured_backends(several, {"UNISONO_SLOTS_B": "", "UNISONO_BACKEND_TOKEN_B": ""})
    monkeypatch.setenv("OLLAMA_BATCH_SIZE", "x")
    with pytest.raises(ValidationError) as caught:
        Settings()
    (line,) = wrong_settings(caught.value, os.environ)
    assert line.startswith("OLLAMA_BATCH_SIZE is 'x'")


@pytest.mark.parametrize(
    ("environ", "lines"),
    [
        (
            {"UNISONO_SLOTS": "8", "unisono_item_timeout": "1s", "UNISONO_SERVER": "x:1", "OLLAMA_BATCH_SIZE": "4"},
            [],
        ),
        ({"UNISONO_SERVICE_PORT_GRPC": "50051", "UNISONO_PORT_50051_TCP_ADDR": "10.0.0.1"}, []),
        (
            {"UNISONO_SLOT": "8"},
            ["UNISONO_SLOT is ignored: there is no such setting; is UNISONO_SLOTS meant?"],
        ),
        ({"UNISONO_XYZ": "8"}, ["UNISONO_XYZ is ignored: there is no such setting"]),
        (
            {"UNISONO_SLOTS_GPU1": "8"},
            ["UNISONO_SLOTS_GPU1 is ignored: it is for one of several backends, and UNISONO_BACKENDS is not set"],
        ),
        (
            {"UNISONO_EMBEDDED": "true", "UNISONO_OLLAMA_URL": "http://x"},
            ["UNISONO_OLLAMA_URL is ignored: UNISONO_EMBEDDED is set too, and goes first"],
        ),
        ({"UNISONO_EMBEDDED": "false", "UNISONO_OLLAMA_URL": "http://x"}, []),
        ({"OLLAMA_HOST": "http://x"}, []),
        (
            {"UNISONO_OLLAMA_URL": "http://y", "OLLAMA_HOST": "http://x"},
            ["OLLAMA_HOST is ignored: UNISONO_OLLAMA_URL is set too, and goes first"],
        ),
        (
            {"UNISONO_BACKENDS": "a=http://y", "UNISONO_OLLAMA_URL": "http://z", "OLLAMA_HOST": "http://x"},
            [
                "UNISONO_OLLAMA_URL is ignored: UNISONO_BACKENDS is set too, and goes first",
                "OLLAMA_HOST is ignored: UNISONO_BACKENDS is set too, and goes first",
            ],
        ),
        (
            {"UNISONO_BATCH_TIMEOUT": "5ms", "OLLAMA_BATCH_TIMEOUT": "9ms", "OLLAMA_BATCH_SIZE": "4"},
            ["OLLAMA_BATCH_TIMEOUT is ignored: UNISONO_BATCH_TIMEOUT is set too, and goes first"],
        ),
        ({"UNISONO_BATCH_TIMEOUT": "", "OLLAMA_BATCH_TIMEOUT": "9ms"}, []),
        (
            {"UNISONO_BACKENDS": "a=http://y", "UNISONO_LLAMA_SERVER_URL": "http://x", "UNISONO_BACKEND_TOKEN": "t"},
            [
                "UNISONO_LLAMA_SERVER_URL is ignored: UNISONO_BACKENDS is set too, and goes first",
                (
                    "UNISONO_BACKEND_TOKEN is ignored: with UNISONO_BACKENDS, each has its own, "
                    "UNISONO_BACKEND_TOKEN_<NAME>"
                ),
            ],
        ),
        ({"UNISONO_BACKENDS": "a=http://y", "UNISONO_SLOTS_A": "3", "UNISONO_BACKEND_TOKEN_A": "t"}, []),
    ],
)
def test_what_does_nothing_is_told(
    monkeypatch: pytest.MonkeyPatch, environ: dict[str, str], lines: list[str]
) -> None:
    """With the name that is near."""
    for variable, value in environ.items():
        monkeypatch.setenv(variable, value)
    assert idle_settings(Settings(), environ) == lines


def test_a_backend_of_the_command_line_goes_before_variables_in_silence() -> None:
    """Whoever names one there means it."""
    assert idle_settings(Settings(embedded=True), {"OLLAMA_HOST": "http://x"}) == []


# -- The window --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "field", "written", "value"),
    [
        ("BATCH_ENABLED", "batch_enabled", "false", False),
        ("BATCH_SIZE", "batch_size", "32", 32),
        ("BATCH_TIMEOUT", "batch_timeout", "100ms", 0.1),
        ("BATCH_TIMEOUT", "batch_timeout", "25", 0.025),
        ("BATCH_TIMEOUT", "batch_timeout", " 2.5 ", 0.0025),
        ("BATCH_TIMEOUT", "batch_timeout", "1s", 1.0),
        ("BATCH_TIMEOUT", "batch_timeout", "0", 0.0),
    ],
)
def test_the_window_has_two_names(
    monkeypatch: pytest.MonkeyPatch, name: str, field: str, written: str, value: object
) -> None:
    """Ollama's count where ours are not set. A bare number of the time means milliseconds, under both."""
    usual = getattr(Settings(), field)
    assert (Settings().batch_enabled, Settings().batch_size, Settings().batch_timeout) == (True, None, 0.01)
    monkeypatch.setenv(f"OLLAMA_{name}", written)
    assert getattr(Settings(), field) == pytest.approx(value)
    monkeypatch.delenv(f"OLLAMA_{name}")
    monkeypatch.setenv(f"UNISONO_{name}", written)
    assert getattr(Settings(), field) == pytest.approx(value)
    assert getattr(Settings(**{field: usual}), field) == usual


@pytest.mark.parametrize(
    ("name", "written"), [("BATCH_SIZE", "0"), ("BATCH_TIMEOUT", "-1ms"), ("BATCH_TIMEOUT", "soon")]
)
def test_a_window_that_is_none(monkeypatch: pytest.MonkeyPatch, name: str, written: str) -> None:
    """No request waits for nobody, or for longer than never."""
    monkeypatch.setenv(f"UNISONO_{name}", written)
    with pytest.raises(ValidationError):
        Settings()


# -- Several backends --------------------------------------------------------------------------------------------

SEVERAL = (
    "gpu1=http://10.0.0.1:11434, gpu2=ollama+http://10.0.0.2:11434,\n"
    "cpp=llama-server+http://127.0.0.1:8080, e-m_b=embedded,"
)


def test_one_backend_where_no_list_is_given() -> None:
    """Of the kind that is configured, which is its name."""
    environ = {"OLLAMA_HOST": "gpu-box"}
    (one,) = configured_backends(Settings(slots=3, backend_token=SecretStr("t")), environ)
    assert (one.name, one.kind, one.url, one.slots) == ("ollama", "ollama", "gpu-box", 3)
    assert one.token.get_secret_value() == "t"
    (one,) = configured_backends(Settings(ollama_url="http://x"), environ)
    assert one.url == "http://x"
    (one,) = configured_backends(Settings(llama_server_url="http://y", ollama_url="http://x"), environ)
    assert (one.name, one.kind, one.url) == ("llama-server", "llama-server", "http://y")
    (one,) = configured_backends(Settings(embedded=True, llama_server_url="http://y"), environ)
    assert (one.name, one.kind, one.url) == ("embedded", "embedded", "")


def test_several_backends_in_one_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kind stands before the address, and Ollama is the usual one; the list wins over what names a single one."""
    monkeypatch.setenv("UNISONO_BACKENDS", SEVERAL)
    monkeypatch.setenv("UNISONO_OLLAMA_URL", "http://elsewhere")
    found = configured_backends(Settings(), {})
    assert [(one.name, one.kind, one.url) for one in found] == [
        ("gpu1", "ollama", "http://10.0.0.1:11434"),
        ("gpu2", "ollama", "http://10.0.0.2:11434"),
        ("cpp", "llama-server", "http://127.0.0.1:8080"),
        ("e-m_b", "embedded", ""),
    ]
    assert [one.loads_on_demand for one in found] == [True, True, False, False]


def test_what_only_one_of_several_has() -> None:
    """A token goes to the one that it is for; a number of slots is for all that have none of their own."""
    environ = {"UNISONO_BACKEND_TOKEN_GPU2": "secret", "UNISONO_SLOTS_E_M_B": "4", "UNISONO_SLOTS_CPP": ""}
    settings = Settings(backends=SEVERAL, slots=2, backend_token=SecretStr("nobody's"))  # type: ignore[arg-type]
    found = configured_backends(settings, environ)
    assert [one.token.get_secret_value() for one in found] == ["", "secret", "", ""]
    assert [one.slots for one in found] == [2, 2, 2, 4]
    assert "secret" not in repr(found)


@pytest.mark.parametrize(
    "text",
    [
        "http://10.0.0.1:11434",
        "gpu 1=http://x",
        "1=http://x",
        "=http://x",
        "gpu1=",
        "gpu1",
        "gpu1=vllm+http://x",
        "gpu1=ollama+",
        "a=http://x, A=http://y",
        "a-b=http://x, a_b=http://y",
        ",",
        " , ,",
    ],
)
def test_lists_that_are_none(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    """Refused at the start."""
    monkeypatch.setenv("UNISONO_BACKENDS", text)
    with pytest.raises(ValidationError):
        Settings()


def test_a_password_in_a_list_is_not_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither by an error nor by the settings' own text."""
    monkeypatch.setenv("UNISONO_BACKENDS", "a=http://me:pa+ss@x, a=http://y")
    with pytest.raises(ValidationError) as caught:
        Settings()
    assert "pa+ss" not in str(caught.value)
    (one,) = parse_backends("a=http://me:pa+ss@x")
    assert (one.kind, one.url) == ("ollama", "http://me:pa+ss@x")
    assert "pa+ss" not in repr(one)


@pytest.mark.parametrize(
    ("variable", "value"),
    [("UNISONO_SLOTS_GPU3", "4"), ("UNISONO_BACKEND_TOKEN_CPP1", "x"), ("UNISONO_SLOTS_GPU1", "0")],
)
def test_variables_of_backends_that_are_wrong(variable: str, value: str) -> None:
    """A slip of the finger is told, and not passed over."""
    settings = Settings(backends=SEVERAL)  # type: ignore[arg-type]  # as it is written
    with pytest.raises(SettingError, match=variable):
        configured_backends(settings, {variable: value})
    assert configured_backends(Settings(), {variable: value})


def test_names_and_pages_of_the_http_port(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lists with commas; a star stands for any text. What cannot be one is refused, with what it should be."""
    assert Settings().http_hosts == Settings().http_origins == ()
    monkeypatch.setenv("UNISONO_HTTP_HOSTS", " unisono.example.org, *.svc ,")
    monkeypatch.setenv("UNISONO_HTTP_ORIGINS", "https://app.example.org, http://[::1]:80, *")
    assert Settings().http_hosts == ("unisono.example.org", "*.svc")
    assert Settings().http_origins == ("https://app.example.org", "http://[::1]:80", "*")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("UNISONO_HTTP_HOSTS", value) for value in ("https://a.b", "a:80", "a b", "a.*", "/")),
        *(("UNISONO_HTTP_ORIGINS", value) for value in ("app.example.org", "https://", "https://a/b", "https://a b")),
    ],
)
def test_what_is_no_name_and_no_page(monkeypatch: pytest.MonkeyPatch, name: str, value: str) -> None:
    """It would never fit anything."""
    monkeypatch.setenv(name, value)
    with pytest.raises(ValidationError):
        _ = Settings()
