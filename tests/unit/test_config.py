from pathlib import Path

import pytest

from modelcask import config
from modelcask.config import DropDirectory
from modelcask.errors import InvalidConfig


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HOME", str(tmp_path))
    for variable in ("XDG_CONFIG_HOME", "XDG_DATA_HOME"):
        monkeypatch.delenv(variable, raising=False)
    return tmp_path


def written(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "config.toml"
    path.write_text(text)
    return path


def test_without_a_file_the_defaults_hold(home: Path) -> None:
    effective = config.load()
    assert effective.store == home / ".local/share/modelcask"
    assert effective.mount == home / "models"
    assert effective.drops == (DropDirectory(home / "imports"),)


def test_a_file_says_it_all(home: Path) -> None:
    path = written(
        home,
        'store = "/srv/store"\nmount = "~/m"\n'
        '[[drop]]\npath = "/a"\n[[drop]]\npath = "/b"\nquantize = "int4"\nnamespace = "org"\nafter = "delete"\n',
    )
    effective = config.load(path)
    assert (effective.store, effective.mount) == (Path("/srv/store"), home / "m")
    assert effective.drops == (DropDirectory(Path("/a")), DropDirectory(Path("/b"), "int4", "org", "delete"))


def test_the_usual_file_is_found(home: Path) -> None:
    (home / ".config/modelcask").mkdir(parents=True)
    (home / ".config/modelcask/config.toml").write_text('store = "/x"')
    assert config.default_store() == Path("/x")


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("store = ", "is no TOML"),
        ("stroe = '/x'", "stroe: no such key; allowed are drop, mount, store, watch"),
        ("store = 3", "store: write a path in quotes"),
        ("store = 'x'", "store: 'x' is relative"),
        ("drop = 3", r"write \[\[drop\]\] tables"),
        ("[[drop]]\nquantize = 'int4'", "drop 1: path is missing"),
        ("[[drop]]\npath = '/a'\nquantize = 'int5'", "drop 1: quantize: 'int5' is none of int4, int8"),
        ("[[drop]]\npath = '/a'\nafter = 'burn'", "after: 'burn' is neither"),
        ("[[drop]]\npath = '/a'\nnamespace = 'a.b'", "drop 1: namespace: .*holds a '.'"),
        ("[[drop]]\npath = '/a'\nx = 1", "drop 1: x: no such key"),
        ("[[drop]]\npath = '/a'\nquantize = ['int4']", r"quantize: \['int4'\] is none of"),
        ("[[drop]]\npath = '/a'\nnamespace = 5", "namespace: write one name"),
        ("[[drop]]\npath = '/a'\nnamespace = 'a/b'", "namespace: write one name"),
        (
            "[[drop]]\npath = '/a'\ndelete_quantized = 'yes'",
            "drop 1: delete_quantized: 'yes' is neither true nor false",
        ),
        ("[[drop]]\npath = '/a'\npolling = 1", "drop 1: polling: 1 is neither true nor false"),
        ("watch = 3", r"watch: write a \[watch\] table"),
        ("[watch]\nparallel = 17", "watch.parallel: 17 is not a number from 1 to 16"),
        ("[watch]\nparallel = true", "watch.parallel: True is not a number"),
        ("[watch]\nstuck_after = 0", "watch.stuck_after: 0 is no number of seconds above 0"),
        ("[watch]\nx = 0", "watch.x: no such key; allowed are parallel, stuck_after"),
        ("[[drop]]\npath = '~nosuchuser/x'", "drop 1: path: "),
    ],
)
def test_what_is_not_allowed_is_told_by_file_key_and_what_is(home: Path, text: str, reason: str) -> None:
    path = written(home, text)
    with pytest.raises(InvalidConfig, match=reason) as caught:
        config.load(path)
    assert str(caught.value).startswith(f"{path}: ")


def test_a_file_that_is_asked_for_must_be_there(home: Path) -> None:
    with pytest.raises(InvalidConfig, match="no such file"):
        config.load(home / "none.toml")
