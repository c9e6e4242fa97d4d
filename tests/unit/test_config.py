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
        ("[[drop]]\npath = '/a'\ndelete_quantized = true", 'delete_quantized: says nothing without after = "delete"'),
        ('store = "/a\\u0007"', "store: .* holds a control character"),
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
    assert str(caught.value).startswith(str(path))


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("mount = '/m'\nstore = 3", 2),
        ("# a\n[[drop]]\npath = '/a'\n\n[[ drop ]] # b\nafter = 'burn'\npath = '/b'", 6),
        ("store = '/x'\n[ watch ] # c\nparallel = 17", 3),
        ("[[drop]]\npath = '/a'\n[watch]\nstore = '/x'", 4),
        ("[[drop]]\npath = '/a'\n[[drop]]\npath = '/a/b'", 4),
    ],
)
def test_the_line_is_told(home: Path, text: str, line: int) -> None:
    path = written(home, text)
    with pytest.raises(InvalidConfig) as caught:
        config.load(path)
    assert str(caught.value).startswith(f"{path}, line {line}: ")


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("store = '/x'\nmount = '/x'", "mount: /x is the store already"),
        ("store = '/x'\nmount = '/x/m'", "mount: /x/m lies in the store, /x"),
        ("mount = '/x'\nstore = '/x/s'", "store: /x/s lies in the mount, /x"),
        ("[[drop]]\npath = '~'", "drop 1: path: .* holds the store, .*/.local/share/modelcask; give each"),
        ("[[drop]]\npath = '/a'\n[[drop]]\npath = '/a'", "drop 2: path: /a is drop 1 already"),
        ("[[drop]]\npath = '/a/b'\n[[drop]]\npath = '/a'", "drop 2: path: /a holds drop 1, /a/b"),
        ("[[drop]]\npath = '/a'\n[[drop]]\npath = '/a/int4'", "drop 2: path: /a/int4 lies in drop 1, /a"),
        ("[[drop]]\npath = '~/link'\n[[drop]]\npath = '/usr/share'", "drop 2: path: /usr/share lies in drop 1"),
        ("[[drop]]\npath = '~/models/x'", "drop 1: path: .*/models/x lies in the mount"),
    ],
)
def test_folders_that_lie_in_one_another_are_refused(home: Path, text: str, reason: str) -> None:
    (home / "link").symlink_to("/usr")
    with pytest.raises(InvalidConfig, match=reason):
        config.load(written(home, text))


def test_folders_whose_names_begin_alike_are_apart(home: Path) -> None:
    path = written(home, "store = '/a'\nmount = '/ab'\n[[drop]]\npath = '/abc'")
    assert config.load(path).mount == Path("/ab")


def test_a_store_that_is_given_must_be_apart_too(home: Path) -> None:
    with pytest.raises(InvalidConfig, match=r"drop 1: path: .* holds the store"):
        config.load(written(home, "[[drop]]\npath = '/a'"), store=Path("/a/store"))


def test_each_setting_knows_where_it_comes_from(home: Path) -> None:
    path = written(home, "mount = '/m'\n[watch]\nparallel = 2\n[[drop]]\npath = '/a'\npolling = true")
    found = {setting.key: (setting.value, setting.line) for setting in config.settings(path, store=Path("/s"))}
    assert found == {
        "store": ("/s", None),
        "mount": ("/m", 1),
        "watch.parallel": (2, 3),
        "watch.stuck_after": (600.0, None),
        "drop 1: path": ("/a", 5),
        "drop 1: quantize": (None, None),
        "drop 1: namespace": (None, None),
        "drop 1: after": ("keep", None),
        "drop 1: delete_quantized": (False, None),
        "drop 1: polling": (True, 6),
    }


def test_a_file_that_is_asked_for_must_be_there(home: Path) -> None:
    with pytest.raises(InvalidConfig, match="no such file"):
        config.load(home / "none.toml")
