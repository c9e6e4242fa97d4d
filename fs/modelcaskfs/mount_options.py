"""Mount options: what stands after `-o`, of the command, of mount(8) or of a line in /etc/fstab."""

from __future__ import annotations

import grp
import os
import pwd
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from modelcask.errors import ModelcaskError, printable

# For the kernel and libfuse. It is always read-only, and permissions are always the kernel's to check.
_FOR_THE_MOUNT = {"allow_other", "allow_root", "nosuid", "suid", "nodev", "dev", "noexec", "exec"}
_ALWAYS = {"ro", "default_permissions"}
# For mount(8), systemd and others who read /etc/fstab, or of no meaning where nothing is written.
_FOR_OTHERS = {
    *("defaults", "auto", "noauto", "nofail", "_netdev", "user", "nouser", "users", "owner", "group"),
    *("rw", "sync", "async", "dirsync", "silent", "loud", "iversion", "noiversion", "mand", "nomand"),
    *("atime", "noatime", "relatime", "norelatime", "strictatime", "nostrictatime", "diratime", "nodiratime"),
    *("lazytime", "nolazytime", "nosymfollow"),
}
_FOR_OTHERS_WITH_VALUE = {"user", "comment", "uhelper", "helper"}


@dataclass(eq=False)
class InvalidOption(ModelcaskError):
    """A mount option that nobody knows, or with a value that cannot be."""

    option: str
    reason: str

    def message(self) -> str:
        return f"-o {self.option}: {self.reason}"


@dataclass(frozen=True, slots=True)
class Ownership:
    """Whose the files seem to be.

    Attributes:
        umask: bits that are taken off the modes 0444 and 0555.
    """

    uid: int
    gid: int
    umask: int = 0


@dataclass(frozen=True, slots=True)
class MountOptions:
    """What was asked for.

    Attributes:
        for_the_mount: options that libfuse and the kernel understand.
        self_contained: whether the mount serves the blobs itself.
        verify: whether each blob is hashed before its first byte is read.
    """

    for_the_mount: tuple[str, ...]
    ownership: Ownership
    self_contained: bool
    verify: bool


def parse(texts: Iterable[str]) -> MountOptions:
    """The options in `texts`, each as after `-o`; of one that stands twice, the last counts.

    Raises:
        InvalidOption: says what is allowed.
    """
    passed: dict[str, None] = {}
    uid, gid, umask = os.getuid(), os.getgid(), 0
    ours = {"self_contained": False, "verify": False}
    for option in (option for text in texts for option in text.split(",") if option):
        name, equals, value = option.partition("=")
        if name.lower().startswith("x-") or (equals and name in _FOR_OTHERS_WITH_VALUE):
            continue
        if name == "uid" and equals:
            uid = _id(option, value, lambda user: pwd.getpwnam(user).pw_uid)
        elif name == "gid" and equals:
            gid = _id(option, value, lambda group: grp.getgrnam(group).gr_gid)
        elif name == "umask" and equals:
            umask = _umask(option, value)
        elif option in ours:
            ours[option] = True
        elif option in _FOR_THE_MOUNT:
            passed[option] = None
        elif option not in _ALWAYS | _FOR_OTHERS:
            known = ", ".join([*sorted(_FOR_THE_MOUNT | _ALWAYS), *ours, "uid=", "gid=", "umask="])
            raise InvalidOption(printable(option), f"there is no such mount option; there are {known}")
    return MountOptions(tuple(passed), Ownership(uid, gid, umask), **ours)


def _id(option: str, value: str, find: Callable[[str], int]) -> int:
    if value.isascii() and value.isdecimal() and int(value) < 1 << 32:
        return int(value)
    try:
        return find(value)
    except (KeyError, ValueError):
        raise InvalidOption(printable(option), "there is nobody of that name; write a number") from None


def _umask(option: str, value: str) -> int:
    try:
        umask = int(value, 8)
    except ValueError:
        umask = -1
    if not 0 <= umask <= 0o777:
        raise InvalidOption(printable(option), "write an octal number such as 027")
    return umask
