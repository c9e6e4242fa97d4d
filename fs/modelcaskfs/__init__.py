"""A read-only FUSE filesystem that shows a modelcask store as ordinary model folders."""

from modelcask import __version__

__all__ = ["__version__"]
