"""Files by address: a path of this machine, or a URL that fsspec opens (s3://, gs://, hf://, https://, ...).

Credentials come from where each service's own tools take them (environment, profile, instance); none is a key
of a config. What goes wrong comes out as one sentence with the address and what to do.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from lcm_kit.errors import UserError, first_line

_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+://")
_LIST = re.compile(r"\{([^{}]*,[^{}]*)\}|\{(\d+)\.\.(\d+)\}")  # {a,b} or {000..123}
_GLOB = re.compile(r"[*?\[]")
_MOST = 1_000_000  # addresses of one pattern: more is a slip
_EXTRAS = {"s3": "'lcm-kit[s3]'", "s3a": "'lcm-kit[s3]'"}  # what pip installs; other schemes below
_PACKAGES = {
    "gs": "gcsfs", "gcs": "gcsfs", "az": "adlfs", "abfs": "adlfs", "abfss": "adlfs", "http": "aiohttp",
    "https": "aiohttp", "hf": "huggingface_hub", "oss": "ossfs", "sftp": "paramiko", "ssh": "paramiko",
}  # fmt: skip
_KEYS = {  # how the most used services are given credentials, by the scheme's service
    "s3": "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE; for a public bucket set "
    "FSSPEC_S3='{\"anon\": true}'",
    "gs": "run `gcloud auth application-default login`, or set GOOGLE_APPLICATION_CREDENTIALS",
    "hf": "run `hf auth login`, or set HF_TOKEN",
}
# Of an error's kind and of those that it is a kind of: no library is imported to ask for its classes
_NO_KEYS = {"NoCredentialsError", "PartialCredentialsError", "CredentialRetrievalError", "ProfileNotFound",
            "DefaultCredentialsError", "TokenRetrievalError", "UnauthorizedSSOTokenError", "PermissionError",
            "GatedRepoError"}  # fmt: skip
_ABSENT = {"FileNotFoundError", "NotADirectoryError", "IsADirectoryError", "RepositoryNotFoundError"}


@dataclass(frozen=True)
class At:
    """A file or a folder somewhere: `path` on the file system `fs` of fsspec's, as `url` names it."""

    url: str
    fs: Any
    path: str

    @property
    def shown(self) -> str:
        """The address for messages and files, without what may be a secret in it."""
        return shown(self.url)


def is_url(place: str) -> bool:
    """Whether `place` is an address with a scheme, as s3://bucket/name, and no path of this machine."""
    return bool(_SCHEME.match(place))


def is_pattern(place: str) -> bool:
    """Whether `place` names several: `*`, `?`, `[a-c]`, `{a,b}`, `{000..123}`; a web query is no pattern."""
    bare = place.partition("?")[0] if place.startswith(("http://", "https://")) else place
    return bool(_LIST.search(bare) or _GLOB.search(bare))


def shown(url: str) -> str:
    """`url` without a user, a password, and the query of a web address: signed ones let anybody in."""
    if not is_url(url):
        return url
    scheme, _, rest = url.partition("://")
    place, slash, path = rest.partition("/")
    if scheme in ("http", "https"):
        path = path.partition("?")[0]
    return f"{scheme}://{place.rpartition('@')[2]}{slash}{path}"


def at(url: str) -> At:
    """Where `url` leads; nothing is asked of it yet. Raises `UserError` where there is no way to open it."""
    import fsspec

    try:
        fs, path = fsspec.core.url_to_fs(url)
    except Exception as error:  # each service's library has its own
        raise refused(url, error) from error
    return At(url, fs, path)


def spelled_out(pattern: str) -> Iterator[str]:
    """The addresses that `{a,b}` and `{000..123}` in `pattern` stand for, in order, as a shell has it.

    Numbers keep the width of the wider end that begins with 0. Raises `UserError` for more than a million.
    """
    parts, place, count = [], 0, 1
    for found in _LIST.finditer(pattern):
        choices: list[str] | range = found[1].split(",") if found[1] is not None else _numbers(found)
        count *= len(choices)
        if count > _MOST:
            raise UserError(f"{shown(pattern)}: stands for more than {_MOST:,} addresses; give fewer")
        width = _width(found)
        parts += [[pattern[place : found.start()]], [f"{choice:>0{width}}" for choice in choices]]
        place = found.end()
    parts.append([pattern[place:]])
    return ("".join(each) for each in itertools.product(*parts))


def _numbers(found: re.Match[str]) -> range:
    first, last = int(found[2]), int(found[3])
    return range(first, last + 1) if first <= last else range(first, last - 1, -1)


def _width(found: re.Match[str]) -> int:
    ends = (found[2], found[3]) if found[1] is None else ()
    return max(map(len, ends), default=0) if any(len(end) > 1 and end[0] == "0" for end in ends) else 0


def fixed_part(pattern: str) -> str:
    """The folder of `pattern` that is the same for all that it stands for, with the `/` at its end."""
    marks = [found.start() for found in (_LIST.search(pattern), _GLOB.search(pattern)) if found]
    return pattern[: pattern.rfind("/", 0, min(marks, default=len(pattern))) + 1]


def matches(pattern: str) -> list[At]:
    """The files that a pattern stands for: `{...}` in its own order, `*`, `?`, `[...]` by name.

    What `{...}` spells out is not looked for: that is noticed when it is read. Raises `UserError` if there is
    no file for a pattern with `*`, `?` or `[`, and as `at`.
    """
    found: dict[str, At] = {}
    for each in spelled_out(pattern):
        place = at(each)
        if not _GLOB.search(each) or not is_pattern(each):
            found.setdefault(each, place)
            continue
        try:
            paths = sorted(
                path for path, info in place.fs.glob(place.path, detail=True).items() if _file(info)
            )
        except Exception as error:
            raise refused(each, error) from error
        if not paths:
            raise UserError(f"{shown(each)}: no file has such a name; check the pattern")
        for path in paths:
            scheme = each.partition("://")[0]
            url = f"{scheme}://{path.lstrip('/')}" if is_url(each) and not is_url(path) else path
            found.setdefault(url, At(url, place.fs, path))
    return list(found.values())


def inside(folder: At) -> list[At]:
    """The files directly in a folder, or below a prefix, by name. Raises `UserError` if it is not there."""
    try:
        infos = folder.fs.ls(folder.path, detail=True)
    except Exception as error:
        raise refused(folder.url, error) from error
    root = folder.url.rstrip("/")
    names = sorted(info["name"].rstrip("/").rpartition("/")[2] for info in infos if _file(info))
    return [At(f"{root}/{name}", folder.fs, f"{folder.path.rstrip('/')}/{name}") for name in names]


def _file(info: Mapping[str, Any]) -> bool:
    return info.get("type") == "file"


def info_of(place: At, *, anew: bool = False) -> Mapping[str, Any]:
    """What is known of a file. `anew`: asked again, whatever was listed before. Raises as `refused` says."""
    try:
        if anew:
            place.fs.invalidate_cache()
        return dict(place.fs.info(place.path))
    except Exception as error:
        raise refused(place.url, error) from error


def identity(info: Mapping[str, Any]) -> str:
    """A file's size and what changes with its content: a hash that its service keeps, else a time.

    Equal where the file is the same; "" where nothing is known of it.
    """
    keys = ("ETag", "etag", "md5Hash", "content_md5", "checksum", "blob_id", "crc32c")
    times = ("mtime", "LastModified", "last_modified", "updated", "created")
    mark = next((str(info[key]).strip('"') for key in (*keys, *times) if info.get(key)), "")
    size = info.get("size")
    return "" if size is None and not mark else f"{'?' if size is None else size}-{mark}".replace(" ", "_")


def refused(url: str, error: BaseException, doing: str = "read") -> UserError:
    """The sentence for what a service, or its library, says against `url`."""
    if isinstance(error, UserError):
        return error
    scheme, name = url.partition("://")[0].lower(), shown(url)
    kinds = {kind.__name__ for each in _chain(error) for kind in type(each).__mro__}
    reason = first_line(error)
    if isinstance(error, ImportError):
        package = _EXTRAS.get(scheme) or _PACKAGES.get(scheme)
        what = f"install it with `pip install {package}`" if package else f"install what it names ({reason})"
        return UserError(f"{name}: the package that opens {scheme}:// is not installed; {what}")
    if isinstance(error, ValueError) and "rotocol not known" in reason:
        return UserError(f"{name}: {scheme}:// is no kind of address that can be opened; check it")
    if kinds & _NO_KEYS and not is_url(url):
        return UserError(f"{name}: cannot be {doing} ({reason}); get the right to, or choose another place")
    if kinds & _NO_KEYS:
        how = _KEYS.get({"s3a": "s3", "gcs": "gs"}.get(scheme, scheme), "as its own tools take them")
        return UserError(f"{name}: cannot be {doing} with the credentials that are here ({reason}); {how}")
    if kinds & _ABSENT:
        return UserError(f"{name}: there is no such file, folder or bucket; check the address")
    return UserError(f"{name}: cannot be {doing} ({reason}); check the address and the connection")


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__


def is_final(error: BaseException) -> bool:
    """Whether trying again cannot help: what is asked for is not there, or not for us."""
    kinds = {kind.__name__ for each in _chain(error) for kind in type(each).__mro__}
    final = (UserError, ImportError, ValueError, TypeError, AttributeError)
    status = getattr(error, "status", None)  # of a web server's answer
    if isinstance(status, int) and 400 <= status < 500 and status not in (408, 429):
        return True
    return isinstance(error, final) or bool(kinds & (_NO_KEYS | _ABSENT))
