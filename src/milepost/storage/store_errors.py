"""Classify obstore's errors: transient or not, and the message.

obstore passes on the errors of Rust's ``object_store`` as text with the full request and the server's answer. That text
may contain an access key or an endpoint with a password, so messages take only the status, the store's error code, and
the operating system's error of a connection from it.
"""

from __future__ import annotations

import errno
import re
from dataclasses import dataclass

from milepost.errors import StorageError

_STATUS = re.compile(r"status code: (\d{3})")
_CODE = re.compile(r"<Code>([A-Za-z0-9.]{1,60})</Code>")
_HTTP_KIND = re.compile(r"HttpError \{\s*kind: (\w+)")
_SYSTEM_WORD = re.compile(r'message: "([A-Za-z ,]{1,80})"')
_PROFILE_ERROR = re.compile(r"External AWS credential provider: (\w{1,60}):")
_METADATA_HOSTS = ("169.254.169.254", "169.254.170.2", "metadata.google.internal")
_PASSING_STATUS = frozenset({408, 429, 500, 502, 503, 504})
_PASSING_CODES = frozenset({"RequestTimeout", "SlowDown", "InternalError", "ServiceUnavailable", "Throttling"})
_BROKEN = {
    "Connect": ("the store can't be reached", errno.ECONNREFUSED),
    "Request": ("the connection was lost", errno.ECONNRESET),
    "Interrupted": ("the connection was lost", errno.ECONNRESET),
    "Decode": ("the response was truncated", errno.ECONNRESET),
    "Timeout": ("the request timed out", errno.ETIMEDOUT),
}
_ADVICE = {
    "NoSuchBucket": "create the bucket, or correct the URL",
    "NoSuchUpload": "the upload was aborted: by a lifecycle rule, or by a run that assumed this one was dead",
    "InvalidAccessKeyId": "check the credentials in the environment",
    "SignatureDoesNotMatch": "check the secret key in the environment",
    "ExpiredToken": "renew the session token",
    "RequestTimeTooSkewed": "set this machine's clock",
    "PermanentRedirect": "set AWS_REGION to the bucket's region",
}
_NO_WAY = (
    "check the endpoint in the environment (AWS_ENDPOINT_URL: http or https, host, port; for Azure the account) and "
    "the network"
)
_NO_PROFILE = "see `aws configure list`; a profile with single sign-on needs `aws sso login`"
_NO_RIGHT = "check the credentials and what the bucket's policy allows (see docs/howto/object-stores.md)"


@dataclass(frozen=True, slots=True)
class Cause:
    """The cause of a failed request. ``passes``: it is transient, and a retry may succeed."""

    text: str
    number: int
    passes: bool = False
    advice: str = ""

    def error(self, operation: str, path: str, doing: str) -> StorageError:
        """Return the StorageError. ``doing`` names the operation ("reading s3://...")."""
        message = f"{self.text} while {doing}" + (f"; {self.advice}" if self.advice else "")
        return StorageError(message, operation=operation, path=path, errno=self.number)


def cause_of(error: Exception) -> Cause:
    """Classify an exception of obstore."""
    text = str(error)
    code = found[1] if (found := _CODE.search(text)) else ""
    if code == "NoSuchBucket":
        return Cause("no such bucket", errno.ENXIO, advice=_ADVICE[code])
    if isinstance(error, FileNotFoundError):
        return Cause("no such object", errno.ENOENT)
    kind = type(error).__name__
    if kind == "AlreadyExistsError":
        return Cause("the object exists", errno.EEXIST)
    if kind == "PreconditionError":
        return Cause("the object has been changed by another process", errno.EEXIST)
    if any(host in text for host in _METADATA_HOSTS):
        return Cause(
            "no credentials were found, neither in the environment nor from an instance role",
            errno.EACCES,
            advice="set the variables or the profile that the cloud's own tools use",
        )
    if (found := _PROFILE_ERROR.search(text)) is not None:
        return Cause(f"the AWS profile gave no credentials ({found[1]})", errno.EACCES, advice=_NO_PROFILE)
    if kind in ("PermissionDeniedError", "UnauthenticatedError"):
        return Cause(f"access denied{f' ({code})' if code else ''}", errno.EACCES, advice=_ADVICE.get(code, _NO_RIGHT))
    if "BareRedirect" in text:
        return Cause("the bucket is in another region", errno.ENXIO, advice=_ADVICE["PermanentRedirect"])
    return _status(text, code) or _broken(text) or Cause("the request could not be sent", errno.EIO)


def _status(text: str, code: str) -> Cause | None:
    found = _STATUS.search(text)
    if found is None:
        return None
    status = int(found[1])
    passes = status in _PASSING_STATUS or code in _PASSING_CODES
    name = f"{status} {code}".strip()
    if status in (401, 403):  # of a listing, for which obstore has no error of its own
        return Cause(f"access denied ({code or status})", errno.EACCES, advice=_ADVICE.get(code, _NO_RIGHT))
    if status == 501:
        return Cause(f"the store does not support this request ({name})", errno.ENOTSUP)
    return Cause(
        f"the store answered {name}",
        errno.EAGAIN if passes else errno.EIO,
        passes,
        _ADVICE.get(code, _NO_WAY if status == 404 else ""),
    )


def _broken(text: str) -> Cause | None:
    found = _HTTP_KIND.search(text)
    if found is None or found[1] not in _BROKEN:
        return None
    cause, number = _BROKEN[found[1]]
    if "InvalidContentType" in text:
        return Cause("the endpoint does not speak https", errno.EPROTO, advice=_NO_WAY)
    if "dns error" in text:
        cause = "the name of the endpoint's host can't be resolved"
    word = _SYSTEM_WORD.search(text)
    advice = _NO_WAY if found[1] == "Connect" else ""
    return Cause(f"{cause} ({word[1].lower()})" if word else cause, number, passes=True, advice=advice)
