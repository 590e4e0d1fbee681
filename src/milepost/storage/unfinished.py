"""Find and abort abandoned multipart uploads on S3, which keeps (and charges for) them for ever.

obstore can neither list nor abort them; botocore can, with the same settings from the environment.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable

from milepost.errors import StorageError


def abort_s3_uploads(bucket: str, prefix: str, is_dead: Callable[[str], bool]) -> int:
    """Abort unfinished uploads of keys that begin with ``prefix``; returns their number.

    ``is_dead`` selects them by the rest of the key. Returns 0 if botocore is not installed: a lifecycle rule of the
    bucket must then do it.

    Raises:
        StorageError: the store refused.
    """
    try:
        import botocore.exceptions
        import botocore.session
    except ImportError:
        return 0
    count = 0
    try:
        region = os.environ.get("AWS_REGION")  # obstore reads this one, botocore only AWS_DEFAULT_REGION
        client = botocore.session.get_session().create_client("s3", region_name=region)
        for page in client.get_paginator("list_multipart_uploads").paginate(Bucket=bucket, Prefix=prefix):
            for upload in page.get("Uploads", ()):
                if not is_dead(upload["Key"].removeprefix(prefix)):
                    continue
                client.abort_multipart_upload(Bucket=bucket, Key=upload["Key"], UploadId=upload["UploadId"])
                count += 1
    except (botocore.exceptions.BotoCoreError, botocore.exceptions.ClientError) as error:
        raise StorageError(
            f"{type(error).__name__} while aborting unfinished uploads below s3://{bucket}/{prefix}: grant "
            "s3:ListBucketMultipartUploads and s3:AbortMultipartUpload, or set a lifecycle rule",
            operation="abort",
            path=f"s3://{bucket}/{prefix}",
            errno=errno.EACCES,
        ) from None  # its text may hold secrets from the environment
    return count
