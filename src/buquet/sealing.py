"""Values at rest: sealed under the App's keys, or plain where it has none. The one seam through which every value goes.

A sealed value is the JSON object `{"buquet.sealed": "<id of the key>.<base64>"}`, so it can stand wherever a value can. The
cipher is AES-256-SIV (RFC 5297), which is deterministic: the same value of the same task always seals to the same bytes. So a
submit or a write that is repeated repeats itself exactly, idempotency keys and payloads under their own hash stay what they are,
and there is no nonce that could ever be used twice. All that it shows is that two values of one task, in the same place, are
equal.

`context` says what a value is and whose, such as a task's id and "args". It is authenticated: a value that somebody moves to
another task, or from the arguments to the result, cannot be opened there.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
import os
from typing import TYPE_CHECKING, Protocol

import msgspec

from buquet.errors import EncryptionKeyMissing, InvalidArgument, UnreadableRecord, UsageError, install

if TYPE_CHECKING:
    from collections.abc import Iterable

    from msgspec import Raw

ENVIRONMENT = "BUQUET_ENCRYPTION_KEYS"
ONLY = "BUQUET_ENCRYPTED_ONLY"
"""The environment's switch for the mode that refuses values which are not encrypted."""
HIDDEN = "(encrypted)"
"""What stands for a text that is encrypted, where people read."""
KEY_BYTES = 32
MARK = b'"buquet.sealed"'
"""The name that marks a sealed value; no value of a user's may consist of it alone."""


class _Sealed(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    sealed: str = msgspec.field(name="buquet.sealed")


class Sealer(Protocol):
    """Turns a value's JSON into what lies in the bucket, and back."""

    @property
    def key_id(self) -> str:
        """Which key seals, by its public id; empty where nothing is sealed."""
        ...

    def can_open(self, key_id: str) -> bool:
        """Tell whether a value sealed under this key may be opened here; the empty id is that of plain values."""
        ...

    def seal(self, body: bytes, context: str) -> bytes:
        """Return what is to be stored. Raises InvalidArgument for a value that would be taken for a sealed one."""
        ...

    def open(self, body: bytes | Raw, context: str) -> bytes | Raw:
        """Return the value's JSON; a plain value is returned as it is.

        Raises EncryptionKeyMissing, and UnreadableRecord for what was changed, or belongs elsewhere.
        """
        ...


def key_id_of(body: bytes | Raw) -> str:
    """Return the id of the key that a stored value is sealed under; empty for a plain one."""
    return _sealed(body).partition(".")[0]


def _sealed(body: bytes | Raw) -> str:
    """Return what a sealed value holds; empty for a plain one."""
    if MARK not in bytes(body)[:40]:
        return ""
    try:
        return msgspec.json.decode(body, type=_Sealed).sealed
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return ""


class Plain:
    """Seals nothing, and opens nothing that is sealed."""

    key_id = ""

    def can_open(self, key_id: str) -> bool:
        """See Sealer."""
        return not key_id

    def seal(self, body: bytes, context: str) -> bytes:
        """See Sealer."""
        if _sealed(body):
            msg = (
                f"the value {context!r} has the one field {MARK.decode()}, which marks encrypted values. Name the field otherwise"
            )
            raise InvalidArgument(msg)
        return body

    def open(self, body: bytes | Raw, context: str) -> bytes | Raw:
        """See Sealer."""
        sealed = _sealed(body)
        if not sealed and (self.can_open("") or not bytes(body)):
            return body
        if not sealed:
            msg = (
                f"the value {context!r} is not encrypted, and this App takes only encrypted values ({ONLY}). Whoever wrote it "
                "has no key: submit the task anew with the keys, or turn the mode off"
            )
            raise UnreadableRecord(msg)
        key_id, _, text = sealed.partition(".")
        return self._unseal(key_id, text, context)

    def _unseal(self, key_id: str, text: str, context: str) -> bytes:  # noqa: ARG002 - for those who can
        raise _missing(key_id, context)


class Keyring(Plain):
    """Seals with its first key, and opens with any: so keys are rotated, the new one being put first.

    `keys`: 32 bytes each, in base64. `only`: refuse values that are not sealed. Raises UsageError, which never shows a key.

    >>> ring = Keyring(["MDEyMzQ1Njc4OWFiY2RlZjAxMjM0NTY3ODlhYmNkZWY="])
    >>> bytes(ring.open(ring.seal(b"[1]", "a task"), "a task"))
    b'[1]'
    """

    def __init__(self, keys: Iterable[str], *, only: bool = False) -> None:
        try:
            from cryptography.exceptions import InvalidTag  # noqa: PLC0415 - optional, and slow to import
            from cryptography.hazmat.primitives.ciphers.aead import AESSIV  # noqa: PLC0415
        except ImportError:
            raise UsageError(f"encryption takes the package cryptography: {install('encryption')}") from None
        self._invalid: type[Exception] = InvalidTag
        self._ciphers: dict[str, AESSIV] = {}
        for number, text in enumerate(keys, start=1):
            key = _key(text, number)
            # the key's id is public; it and the cipher's key are derived, so that neither tells of the other
            self._ciphers[_derived(key, "id")[:4].hex()] = AESSIV(_derived(key, "AES-256-SIV"))
        if not self._ciphers:
            msg = f"encryption needs a key at least: 32 random bytes in base64, as `openssl rand -base64 {KEY_BYTES}` prints them"
            raise UsageError(msg)
        self.key_id = next(iter(self._ciphers))
        self._only = only

    def __repr__(self) -> str:
        """Show the public ids."""
        return f"<buquet Keyring of {', '.join(self._ciphers)}>"

    def can_open(self, key_id: str) -> bool:
        """See Sealer."""
        return key_id in self._ciphers if key_id else not self._only

    def seal(self, body: bytes, context: str) -> bytes:
        """See Sealer."""
        text = base64.b64encode(self._ciphers[self.key_id].encrypt(body, [context.encode()])).decode()
        return msgspec.json.encode(_Sealed(f"{self.key_id}.{text}"))

    def _unseal(self, key_id: str, text: str, context: str) -> bytes:
        cipher = self._ciphers.get(key_id)
        if cipher is None:
            raise _missing(key_id, context)
        try:
            return cipher.decrypt(base64.b64decode(text, validate=True), [context.encode()])
        except (self._invalid, ValueError, binascii.Error):
            pass
        msg = f"the encrypted value {context!r} was changed, or belongs elsewhere. Restore an earlier version of the record"
        raise UnreadableRecord(msg)


def _missing(key_id: str, context: str) -> EncryptionKeyMissing:
    return EncryptionKeyMissing(
        f"the value {context!r} is encrypted under key {key_id[:20]!r}, which is not here. Put that key into {ENVIRONMENT}"
    )


def _key(text: str, number: int) -> bytes:
    try:
        key = base64.b64decode(text.strip().replace("-", "+").replace("_", "/"), validate=True)
    except (ValueError, binascii.Error):
        key = b""
    if len(key) != KEY_BYTES:
        raise UsageError(f"encryption key {number} is not 32 bytes in base64: make one with `openssl rand -base64 {KEY_BYTES}`")
    return key


def _derived(key: bytes, what: str) -> bytes:
    return hmac.digest(key, f"buquet {what}".encode(), hashlib.sha512)


def sealer(keys: Iterable[str] | str | None, *, only: bool | None = None) -> Sealer:
    """Return the sealer for an App's `encryption`: None means the environment's keys, and none at all Plain.

    `only` refuses plain values; None means the environment's BUQUET_ENCRYPTED_ONLY. Raises UsageError for that mode without keys.
    """
    text = os.environ.get(ENVIRONMENT, "") if keys is None else keys
    each = text.split(",") if isinstance(text, str) else text
    found = [one for one in each if one.strip()]
    if only is None:
        only = _switched_on(os.environ.get(ONLY, ""))
    if found:
        return Keyring(found, only=only)
    if only:
        raise UsageError(f"an App that takes only encrypted values needs keys: set {ENVIRONMENT}, or pass encryption=[...]")
    return Plain()


def _switched_on(text: str) -> bool:
    if text not in {"", "0", "1"}:
        raise UsageError(f"{ONLY} is 1 (on) or 0 (off), not {text[:20]!r}")
    return text == "1"
