"""Create a versioned bucket: `python bucket.py ENDPOINT BUCKET`, credentials in the environment. Fails without a server."""

import contextlib
import os
import sys

import boto3
from botocore.config import Config

endpoint, name = sys.argv[1:]
quick = Config(retries={"total_max_attempts": 1}, connect_timeout=3, read_timeout=10)
s3 = boto3.client("s3", endpoint_url=endpoint, region_name=os.environ["AWS_REGION"], config=quick)
with contextlib.suppress(s3.exceptions.BucketAlreadyOwnedByYou, s3.exceptions.BucketAlreadyExists):
    s3.create_bucket(Bucket=name)
s3.put_bucket_versioning(Bucket=name, VersioningConfiguration={"Status": "Enabled"})
