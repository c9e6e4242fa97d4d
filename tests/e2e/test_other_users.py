"""Other users of the machine: what they can read, what they cannot change, and what an import by root does not do for
them. Their processes really run as others, so these tests need root.
"""

from __future__ import annotations

import errno
import grp
import json
import os
import shutil
import stat
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

import pytest

from folders import files_of, write_model
from modelcask.config import DropDirectory
from modelcask.index import Drop
from modelcask.mounts import current_mounts, mounts_of
from modelcask.store import Store
from running import CommandLine, wait_for

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="running as other users needs root")

SECRET = "the secret of root"
OTHER, THIRD = 65_534, 65_533


@cache
def _python_for_others() -> tuple[str, list[str]]:
    """An interpreter that other users may start, and where it finds our packages: this one may lie in /root."""
    paths = os.environ["PYTHONPATH"].split(os.pathsep)
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    for python, more in ((sys.executable, []), (f"/usr/bin/{version}", [sysconfig.get_path("purelib")])):
        command = [
            "setpriv",
            f"--reuid={OTHER}",
            f"--regid={OTHER}",
            "--clear-groups",
            "sh",
            "-c",
            '"$@"',
            "sh",
            python,
        ]
        command += ["-c", "import modelcask.cli.main, xxhash"]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join([*paths, *more])}
        if subprocess.run(command, check=False, capture_output=True, env=environment).returncode == 0:
            return python, [*paths, *more]
    pytest.skip("other users may start no interpreter that has our packages")


class User:
    """Runs commands as a user without rights."""

    def __init__(self, uid: int, home: Path, *, group: int | None = None) -> None:
        self.uid = uid
        self.home = home
        self._prefix = ["setpriv", f"--reuid={uid}", f"--regid={group or uid}", "--clear-groups"]
        home.mkdir()
        os.chown(home, uid, group or uid)
        self._python, paths = _python_for_others()
        self.environment = {**os.environ, "HOME": str(home), "PYTHONPATH": os.pathsep.join(paths)}

    def run(self, *command: str | Path, umask: int = 0o022) -> subprocess.CompletedProcess[str]:
        shell = ["sh", "-c", f'umask {umask:o}; exec "$@"', "sh", *map(str, command)]
        return subprocess.run(
            [*self._prefix, *shell], capture_output=True, text=True, env=self.environment, check=False, timeout=60
        )

    def cask(self, *command: str | Path, umask: int = 0o022) -> subprocess.CompletedProcess[str]:
        return self.run(self._python, "-m", "modelcask", *command, umask=umask)

    def python(self, code: str, *arguments: str | Path) -> str:
        done = self.run(self._python, "-c", code, *arguments)
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()


@pytest.fixture
def place() -> Iterator[Path]:
    """A folder that everybody reaches; pytest's own is root's."""
    place = Path(tempfile.mkdtemp(prefix="modelcask-users-"))
    place.chmod(0o755)
    yield place
    shutil.rmtree(place)


@pytest.fixture
def other(place: Path) -> User:
    return User(OTHER, place / "other")


@pytest.fixture
def cask(place: Path) -> CommandLine:
    (place / "home").mkdir()
    return CommandLine(place / "store", place / "home")


def modes(root: Path) -> dict[str, str]:
    return {str(path.relative_to(root)): stat.filemode(path.lstat().st_mode) for path in sorted(root.rglob("*"))}


@pytest.mark.parametrize("umask", [0o000, 0o022, 0o077, 0o377, 0o777])
def test_the_modes_are_the_same_whatever_the_umask(place: Path, other: User, umask: int) -> None:
    write_model(place / "m")
    store = other.home / "store"
    done = other.cask("import", place / "m", "--store", store, umask=umask)
    assert done.returncode == 0, done.stderr
    for path, mode in modes(store).items():
        if path.startswith("blobs/"):
            assert mode == "-r--r--r--", path
        elif (store / path).is_dir():
            assert mode == "drwxr-xr-x", path
        else:
            assert mode == "-rw-r--r--", path
    assert stat.filemode(store.stat().st_mode) == "drwxr-xr-x"


def test_a_second_user_reads_and_cannot_write_replace_or_delete(cask: CommandLine, place: Path, other: User) -> None:
    folder = write_model(place / "m")
    cask("import", folder)
    before = {path: path.read_bytes() for path in cask.store.rglob("*") if path.is_file() and "sqlite" not in path.name}
    tried = other.python(
        """
import os, sys
from pathlib import Path
store, refused, done = Path(sys.argv[1]), 0, []
for path in [store, *sorted(store.rglob("*"))]:
    attempts = [lambda: path.rename(str(path) + "x"), lambda: path.chmod(0o777), lambda: os.utime(path)]
    if path.is_dir():
        attempts += [lambda: (path / "new").touch(), lambda: (path / "new").mkdir(), lambda: path.rmdir()]
    else:
        attempts += [lambda: path.open("r+b"), lambda: path.unlink(), lambda: os.truncate(path, 0)]
    for attempt in attempts:
        try:
            attempt()
            done.append(str(path))
        except PermissionError:
            refused += 1
        except OSError as error:
            done.append(f"{path}: {error}") if "not empty" not in str(error) else None
print(refused, done)
""",
        cask.store,
    )
    refused, _, done = tried.partition(" ")
    assert done == "[]"
    assert int(refused) > 100
    for path, data in before.items():
        assert path.read_bytes() == data
    store = ("--store", cask.store)
    for command in (("ls", *store), ("show", "m", *store), ("df", *store), ("status", *store)):
        assert other.cask(*command).returncode == 0, command
    for command in (("rm", "m", *store), ("gc", *store), ("import", folder, "--name", "x", *store)):
        said = other.cask(*command)
        assert said.returncode == 1
        assert said.stderr.count("\n") == 1, said.stderr
        assert "permission denied; change the permissions" in said.stderr
    assert cask("verify").status == 0


@pytest.mark.fuse
def test_a_mount_without_allow_other_shows_others_nothing(cask: CommandLine, place: Path, other: User) -> None:
    cask("import", write_model(place / "m"))
    look = "import os, sys\ntry: print(os.listdir(sys.argv[1]))\nexcept OSError as error: print(error.errno)"
    with cask.mounted(place / "mnt") as root:
        assert other.python(look, root) == str(errno.EACCES)
        assert other.python(look, root / "diffusers/library/m/latest") == str(errno.EACCES)
    with cask.mounted(place / "all", "-o", "allow_other") as root:
        assert "diffusers" in other.python(look, root)
        weights = root / "diffusers/library/m/latest/vae/diffusion_pytorch_model.safetensors"
        assert other.run("sh", "-c", f"cat {weights} >/dev/null").returncode == 0
        assert other.run("sh", "-c", f": >> {weights}").returncode != 0
        assert other.run("chmod", "777", weights).returncode != 0


@pytest.mark.fuse
def test_a_user_mounts_a_store_that_he_may_only_read(cask: CommandLine, place: Path, other: User) -> None:
    folder = write_model(place / "m")
    if Path("/dev/fuse").stat().st_mode & 0o006 != 0o006:
        pytest.skip("users may not use /dev/fuse here")
    cask("import", folder)
    mountpoint = other.home / "mnt"
    mountpoint.mkdir()
    os.chown(mountpoint, OTHER, OTHER)
    done = other.cask("mount", mountpoint, "--store", cask.store)
    assert done.returncode == 0, done.stderr
    try:
        hashes = "import hashlib, sys; print(hashlib.sha256(open(sys.argv[1], 'rb').read()).hexdigest())"
        name = "transformer/diffusion_pytorch_model.safetensors"
        shown = mountpoint / "diffusers/library/m/latest" / name
        assert other.python(hashes, shown) == other.python(hashes, folder / name)
        # He chose its name; what he shows there is his affair, so root's commands do not send anybody there.
        (his,) = [mount for mount in current_mounts() if mount.mountpoint == mountpoint]
        assert (his.user, his.store) == (OTHER, cask.store)
        assert mounts_of(cask.store) == []
        assert "is not mounted anywhere" in cask("path", "m", status=1).err
        assert cask("status", "--json").json["mounts"] == []
    finally:
        subprocess.run(["umount", str(mountpoint)], check=True)


def test_a_group_shares_a_store_in_a_setgid_folder(place: Path) -> None:
    group = grp.getgrnam("nogroup").gr_gid
    shared = place / "shared"
    shared.mkdir()
    os.chown(shared, 0, group)
    shared.chmod(0o2775)
    store = ("--store", shared / "store")
    first, second = (User(uid, place / name, group=group) for uid, name in ((OTHER, "first"), (THIRD, "second")))
    write_model(place / "one", transformer="one")
    write_model(place / "two", transformer="two")
    for user, model in ((first, "one"), (second, "two"), (first, "two")):
        done = user.cask("import", place / model, "--name", f"lab/{model}", *store, umask=0o077)
        assert done.returncode == 0, done.stderr
    for path in [shared / "store", *(shared / "store").rglob("*")]:
        status = path.stat()
        assert status.st_gid == group
        if path.is_dir():
            assert stat.filemode(status.st_mode) == "drwxrwsr-x", path
        elif path.parent.name == "blobs":
            assert stat.filemode(status.st_mode) == "-r--r--r--", path
    assert second.cask("rm", "lab/one", *store).returncode == 0
    done = second.cask("gc", "--json", *store)
    assert json.loads(done.stdout)["removed_blobs"] > 0, done.stderr
    assert first.cask("verify", *store).returncode == 0
    outsider = User(65_532, place / "outsider")
    assert outsider.cask("import", place / "one", *store).returncode == 1
    assert outsider.cask("ls", *store).stdout.count("lab/") == 1


@pytest.fixture
def drops(place: Path, other: User) -> Path:
    """A drop directory of root's daemon that everybody may write to."""
    drops = place / "drops"
    drops.mkdir()
    drops.chmod(0o777)  # not sticky: there, fs.protected_symlinks would do our work
    (place / "secret").mkdir()
    (place / "secret").chmod(0o700)
    write_model(place / "secret" / "private")
    (place / "secret" / "private" / "README.md").write_text(SECRET)
    write_model(other.home / "mine")
    for path in [other.home, *other.home.rglob("*")]:
        os.chown(path, OTHER, OTHER)
    return drops


@pytest.fixture
def states(cask: CommandLine, place: Path, drops: Path) -> Iterator[Callable[[], dict[str, Drop]]]:
    """What root's running daemon says of its drops."""
    (place / "config.toml").write_text(f'[[drop]]\npath = "{drops}"\n')
    command = [sys.executable, "-m", "modelcask", "watch", "--config", str(place / "config.toml")]
    with (place / "log").open("wb") as log:
        process = subprocess.Popen(command, stderr=log, env=cask.environment)

    def now() -> dict[str, Drop]:
        assert process.poll() is None, (place / "log").read_text()
        index = Store.open(cask.store).index_for_looking() if cask.store.exists() else None
        try:
            return {drop.path.name: drop for drop in index.drops()} if index else {}
        finally:
            if index:
                index.close()

    yield now
    process.terminate()
    process.wait(timeout=30)


def test_a_daemon_of_root_follows_no_link_of_a_user(
    cask: CommandLine, place: Path, drops: Path, other: User, states: Callable[[], dict[str, Drop]]
) -> None:
    private = place / "secret" / "private"
    link = "import os, sys; os.symlink(sys.argv[1], sys.argv[2])"
    # The drop itself, a folder of drops, a type's folder, a folder in a drop, a file in a drop, a download's lock.
    other.python(link, private, drops / "link")
    other.python(link, place / "secret", drops / "org")
    other.python(link, place / "secret", drops / "int4")
    for name, inner, target in (
        ("inside", "vae", private / "vae"),
        ("file", "README.md", private / "README.md"),
        ("blobs", "vae/x.json", private / "README.md"),
    ):
        assert other.run("cp", "-r", other.home / "mine", drops / name).returncode == 0
        other.run("rm", "-rf", drops / name / inner)
        other.python(link, target, drops / name / inner)
    assert other.run("cp", "-r", other.home / "mine", drops / "sound").returncode == 0
    wait_for(lambda: states().get("sound") and states()["sound"].state == "imported")
    names = {"link", "inside", "file", "blobs"}
    found = wait_for(lambda: names <= states().keys() and all(states()[name].error for name in names) and states())
    assert "another user's symlink, which is not followed" in found["link"].error
    for name in ("inside", "file", "blobs"):
        assert "a symlink that leads out of the folder" in found[name].error
    assert [each["name"] for each in cask("ls", "--json").json] == ["library/sound:latest"]
    assert not any(SECRET.encode() in path.read_bytes() for path in (cask.store / "blobs").iterdir())
    # Root's own link is root's decision.
    (drops / "mine").symlink_to(other.home / "mine")
    wait_for(lambda: "mine" in states() and states()["mine"].state == "imported")


def test_a_drop_whose_folder_is_swapped_during_the_import_gives_root_s_files_to_nobody(
    cask: CommandLine, place: Path, drops: Path, other: User, states: Callable[[], dict[str, Drop]]
) -> None:
    private = place / "secret" / "private"
    swaps = """
import os, sys, shutil, time
mine, drop, private = sys.argv[1:]
until = time.monotonic() + 6
shutil.copytree(mine, drop)
while time.monotonic() < until:
    for inner in ("vae", "."):
        here, aside = os.path.normpath(os.path.join(drop, inner)), drop + "-aside"
        os.rename(here, aside)
        os.symlink(os.path.normpath(os.path.join(private, inner)), here)
        time.sleep(0.0005)
        os.unlink(here)
        os.rename(aside, here)
        time.sleep(0.0005)
os.utime(os.path.join(drop, "README.md"))
"""
    other.python(swaps, other.home / "mine", drops / "swapped", private)
    wait_for(lambda: states().get("swapped") and states()["swapped"].state == "imported")
    assert not any(SECRET.encode() in path.read_bytes() for path in (cask.store / "blobs").iterdir())
    with cask.mounted(place / "mnt") as root:
        assert files_of(root / "diffusers/library/swapped/latest") == files_of(other.home / "mine")


def test_the_configured_directory_itself_may_be_a_link_of_anybody(place: Path, drops: Path) -> None:
    """Who writes the configuration decides where it leads."""
    from modelcask.settle import look

    (place / "linked").symlink_to(drops)
    os.chown(place / "linked", OTHER, OTHER, follow_symlinks=False)
    write_model(drops / "m")
    directory = DropDirectory(place / "linked")
    assert look(directory.path / "m", namespace=None, beneath=directory.path).plan is not None
