"""Create clients for ``s3://``, ``gs://`` and ``az://``, configured like the clouds' own tools.

Credentials, endpoint and region come from the environment: obstore reads the variables, web identities, container and
instance roles itself; botocore reads the profiles of ``~/.aws``, as in the AWS command line. None of it is stored here,
or ever part of a name, a message or a file.
"""

from __future__ import annotations

import datetime
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from milepost.errors import ConfigError

_URL = re.compile(
    r"(?P<scheme>[a-z0-9]+)://(?P<bucket>[a-z0-9][a-z0-9._-]{1,254})(?P<path>/[^?#\x00-\x1f\x7f]*)?", re.IGNORECASE
)
_ENDPOINT = re.compile(r"https?://[^\s/?#]+/?[^\s?#]*", re.IGNORECASE)
_AWS_KEYS = ("AWS_ACCESS_KEY_ID", "AWS_WEB_IDENTITY_TOKEN_FILE", "AWS_SKIP_SIGNATURE")
_AWS_CONTAINER = ("AWS_CONTAINER_CREDENTIALS_RELATIVE_URI", "AWS_CONTAINER_CREDENTIALS_FULL_URI")
_AWS_REGIONS = ("AWS_REGION", "AWS_DEFAULT_REGION")
_AWS_ENDPOINTS = ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL")
_AWS_PAIR = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY")
_AZURE_NAMES = {"AZURE_STORAGE_ACCOUNT": "account_name", "AZURE_STORAGE_KEY": "account_key"}
_REFRESH = datetime.timedelta(minutes=5)


@dataclass(frozen=True, slots=True)
class StoreUrl:
    """``scheme://bucket/path``; for Azure the bucket is the container. ``path`` has no slash at either end."""

    scheme: str
    bucket: str
    path: str

    def __str__(self) -> str:
        return f"{self.scheme}://{self.bucket}" + (f"/{self.path}" if self.path else "")


def parse_store_url(text: str) -> StoreUrl:
    """Parse a URL.

    Raises:
        ConfigError: it has no bucket, or more than a bucket and a path, such as credentials or a query.
    """
    found = _URL.fullmatch(text)
    if found is None:
        scheme = text.partition("://")[0]
        # The text may hold a secret: do not repeat it.
        raise ConfigError(
            f"a {scheme}:// URL must be {scheme}://<bucket>/<path>, without credentials, port, '?', '#' and control "
            "characters: credentials and endpoint come from the environment"
        )
    path = (found["path"] or "").strip("/")
    if path and any(part in ("", ".", "..") for part in path.split("/")):  # stores take these literally or reject them
        raise ConfigError(f"{text}: the path must have no empty parts, '.' and '..'")
    return StoreUrl(found["scheme"].lower(), found["bucket"], path)


def connect(url: StoreUrl, *, client_options: dict[str, Any], retry_config: dict[str, Any]) -> Any:
    """Create a client for the root of ``url``'s bucket. Makes no request.

    Raises:
        ConfigError: the environment does not configure that store.
    """
    import obstore.store
    from obstore.exceptions import BaseError

    kinds: Any = obstore.store
    options = {"client_options": client_options, "retry_config": retry_config}
    try:
        if url.scheme == "s3":
            return kinds.S3Store(url.bucket, **options | _aws(client_options))
        if url.scheme == "gs":
            return kinds.GCSStore(url.bucket, **options)
        return kinds.AzureStore(url.bucket, config=_azure(), **options)
    except (BaseError, ValueError, OSError) as error:
        raise ConfigError(_why_not(url, str(error))) from None  # its text may hold secrets from the environment


def _why_not(url: StoreUrl, text: str) -> str:
    if "Account must be specified" in text:
        return f"{url}: set AZURE_STORAGE_ACCOUNT_NAME to the storage account that the container is in"
    if "service account" in text or "OpenCredentials" in text:
        return f"{url}: the file that GOOGLE_APPLICATION_CREDENTIALS or GOOGLE_SERVICE_ACCOUNT names can't be read"
    return f"{url}: the settings in the environment do not configure this store"


def _azure() -> dict[str, str]:
    return {option: os.environ[name] for name, option in _AZURE_NAMES.items() if os.environ.get(name)}


def _aws(client_options: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments for S3 that obstore does not find in the environment itself."""
    missing = [name for name in _AWS_PAIR if not os.environ.get(name)]
    if len(missing) == 1:
        raise ConfigError(f"set {missing[0]} too, or neither of {' and '.join(_AWS_PAIR)}")
    profile = _AwsProfile.find()
    config: dict[str, str] = {}
    endpoint = next(filter(None, map(os.environ.get, _AWS_ENDPOINTS)), "")
    if profile is not None:
        if not endpoint and profile.endpoint:
            endpoint = config["endpoint"] = profile.endpoint
        if profile.region and not any(map(os.environ.get, _AWS_REGIONS)):
            config["region"] = profile.region
    if endpoint and not _ENDPOINT.fullmatch(endpoint):
        raise ConfigError("AWS_ENDPOINT_URL must be http://<host>:<port> or https://<host>")  # it may hold a secret
    if endpoint.startswith("http://"):
        client_options = {**client_options, "allow_http": True}
    arguments: dict[str, Any] = {"config": config, "client_options": client_options}
    if profile is not None and profile.has_credentials:
        arguments["credential_provider"] = profile
    return arguments


class _AwsProfile:
    """Credentials of a profile in ``~/.aws`` of any kind; obstore calls it when it needs them."""

    def __init__(self, session: Any, *, for_credentials: bool):
        self._session = session
        self.has_credentials = for_credentials and session.get_credentials() is not None
        scoped = session.get_scoped_config()
        services = session.full_config.get("services", {}).get(scoped.get("services", ""), {})
        self.region: str = scoped.get("region", "")
        self.endpoint: str = services.get("s3", {}).get("endpoint_url", "") or scoped.get("endpoint_url", "")

    @classmethod
    def find(cls) -> _AwsProfile | None:
        """Return the profile to use; None if there is none, or the environment says all that it could.

        Credentials of the environment come first, as in AWS's own tools; region and endpoint are still the profile's.

        Raises:
            ConfigError: ``AWS_PROFILE`` names a missing profile, or botocore is not installed.
        """
        named = os.environ.get("AWS_PROFILE", "")
        has_own = any(os.environ.get(name) for name in (*_AWS_KEYS, *(() if named else _AWS_CONTAINER)))
        if has_own and all(any(os.environ.get(name) for name in names) for names in (_AWS_REGIONS, _AWS_ENDPOINTS)):
            return None
        if not named and not any(path.exists() for path in _aws_files()):
            return None
        try:
            import botocore.exceptions
            import botocore.session
        except ImportError as error:
            if has_own:
                return None
            raise ConfigError("a profile in ~/.aws needs botocore: pip install 'milepost[cloud]'") from error
        try:
            return cls(botocore.session.Session(profile=named or None), for_credentials=not has_own)
        except botocore.exceptions.BotoCoreError as error:
            if has_own and not named:
                return None
            name = type(error).__name__
            raise ConfigError(
                f"the AWS profile '{named or 'default'}' can't be used ({name}): see `aws configure list`"
            ) from None

    def __call__(self) -> dict[str, Any]:
        frozen = self._session.get_credentials().get_frozen_credentials()  # botocore renews them when they expire
        return {
            "access_key_id": frozen.access_key,
            "secret_access_key": frozen.secret_key,
            "token": frozen.token,
            "expires_at": datetime.datetime.now(datetime.UTC) + _REFRESH,
        }


def _aws_files() -> tuple[Path, ...]:
    home = Path.home() / ".aws"
    return (
        Path(os.environ.get("AWS_SHARED_CREDENTIALS_FILE") or home / "credentials").expanduser(),
        Path(os.environ.get("AWS_CONFIG_FILE") or home / "config").expanduser(),
    )
