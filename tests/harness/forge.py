"""Tokens that no honest client would send, made with jwcrypto and, where a forger could only dream of it, the node's own key.

A genuine token is opened with the key from the ring file, its claims are changed, and it is sealed again: what is refused
then is refused for the change alone.
"""
import base64
import json
import os
import zlib

from cryptography.hazmat.primitives.ciphers.aead import AESGCM


def encode(data):
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()


def decode(text):
    return base64.urlsafe_b64decode(text + "=" * (-len(text) % 4))


class Forger:
    """Holds the node's newest key, taken from its data directory."""

    def __init__(self, node, genuine):
        self.node = node
        self.parts = genuine.split(".")
        self.header = json.loads(decode(self.parts[0]))
        self.key = ring_key(node, self.header["kid"])
        _, _, iv, ciphertext, tag = self.parts
        plain = AESGCM(self.key).decrypt(decode(iv), decode(ciphertext) + decode(tag), self.parts[0].encode())
        self.padded = len(plain)
        self.claims = json.loads(plain)

    def seal(self, claims=None, *, header=None, plain=None, raw_header=None, tag_bytes=16, iv_bytes=12, key=None):
        """A compact JWE under the node's key; whatever is not given is as in the genuine token."""
        plain = json.dumps(self.claims if claims is None else claims).encode() if plain is None else plain
        protected = encode(raw_header if raw_header is not None else self.protected(self.header if header is None else header))
        iv = os.urandom(iv_bytes)
        sealed = AESGCM(key or self.key).encrypt(iv, plain, protected.encode())
        token = ".".join([protected, "", encode(iv), encode(sealed[:-16]), encode(sealed[-16:][:tag_bytes])])
        self.node.minted.append(token)  # Just as secret, where it works.
        return token

    def protected(self, header):
        """The header's JSON, written as the node writes it: a token must not be refused for a blank alone."""
        genuine = decode(self.parts[0])
        return genuine if header == self.header else json.dumps(header, separators=(",", ":")).encode()

    def with_claims(self, **changes):
        """The genuine claims with some changed, or removed (None)."""
        claims = {name: value for name, value in (self.claims | changes).items() if value is not None}
        return self.seal(claims)

    def of_length(self, least):
        """A good token of at least that many characters (base64 has no length of 1 more than a multiple of 4)."""
        plain, fixed = json.dumps(self.claims).encode(), len(self.parts[0]) + 16 + 22 + 4
        while fixed + len(encode(plain)) < least:
            plain += b" "  # Blanks after the claims are still JSON.
        return self.seal(plain=plain)

    def zipped(self, size):
        """A token that says `zip: DEF` and inflates to `size` bytes."""
        packer = zlib.compressobj(9, zlib.DEFLATED, -15)
        # Blanks after the claims are still JSON: inflated, these would be the claims of a good token.
        plain = packer.compress(json.dumps(self.claims).encode() + b" " * size) + packer.flush()
        return self.seal(header=self.header | {"zip": "DEF"}, plain=plain)


def ring_key(node, kid):
    """The 32 bytes of that key, wherever in the ring file they are."""
    for path in sorted(node.data_dir.rglob("*.json")):
        if "key" not in path.name and "token" not in path.name:
            continue
        found = search(json.loads(path.read_text()), kid)
        if found:
            return found
    raise AssertionError(f"no file under {node.data_dir} holds the token key {kid}")


def search(value, kid):
    """The key of that kid in a JSON value: an object that has the kid among its members' values, or under its name."""
    if isinstance(value, list):
        return next((key for item in value if (key := search(item, kid))), None)
    if not isinstance(value, dict):
        return None
    if kid in value.values():
        texts = [text for text in value.values() if isinstance(text, str) and text != kid]
        return next((key for text in texts if (key := thirty_two_bytes(text))), None)
    if isinstance(value.get(kid), str):
        return thirty_two_bytes(value[kid])
    return next((key for item in value.values() if (key := search(item, kid))), None)


def thirty_two_bytes(text):
    for read in (bytes.fromhex, decode, base64.b64decode):
        try:
            data = read(text)
        except ValueError:
            continue
        if len(data) == 32:
            return data
    return None
