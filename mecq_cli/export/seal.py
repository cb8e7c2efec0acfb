"""A SHA-256 over every byte of an ONNX file, kept inside it as a metadata property.

ONNX has no checksum of its own: most flipped bits load and compute something else. The digest
is taken of the file with 64 zeros in its place.
"""

from __future__ import annotations

import hashlib
import re

import onnx

from mecq_cli.errors import ArtifactError

PRODUCER = "mecq"
METADATA_KEY = "mecq.metadata"
_DIGEST_KEY = "mecq.sha256"
_NO_DIGEST = b"0" * 64
# A property is two protobuf strings: the key, then tag 0x12 and the length 0x40 of the value.
_DIGEST = re.compile(re.escape(_DIGEST_KEY).encode() + rb"\x12\x40([0-9a-f]{64})")


def seal(model: onnx.ModelProto) -> bytes:
    """Serialize deterministically, with the digest in it. Changes the properties of ``model``."""
    model.metadata_props.add(key=_DIGEST_KEY, value=_NO_DIGEST.decode())
    data: bytes = model.SerializeToString(deterministic=True)
    matches = list(_DIGEST.finditer(data))
    if len(matches) != 1:
        raise ArtifactError(f"the metadata of the model must not contain '{_DIGEST_KEY}'")
    digest = hashlib.sha256(data).hexdigest()
    model.metadata_props[-1].value = digest
    start, end = matches[0].span(1)
    return data[:start] + digest.encode() + data[end:]


def is_sealed(data: bytes, source: str) -> bool:
    """Whether a file carries a digest of ours, which then is right.

    Raises:
        ArtifactError: the file is ours and was changed or cut off after it was written.
    """
    matches = list(_DIGEST.finditer(data))
    if not matches and PRODUCER.encode() not in data[:64]:
        return False
    if len(matches) == 1:
        start, end = matches[0].span(1)
        digest = hashlib.sha256(data[:start])
        digest.update(_NO_DIGEST)
        digest.update(memoryview(data)[end:])
        if digest.hexdigest().encode() == matches[0].group(1):
            return True
    raise ArtifactError(
        f"{source}: the file was damaged or changed after it was written (its SHA-256 does not "
        "match); export it again"
    )
