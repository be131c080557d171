// Reads or writes one compact JWE with the library jose: {"key", "token"} or {"key", "header", "plaintext"} on standard input,
// the plaintext or the token on standard output.
import { text } from "node:stream/consumers";
import { CompactEncrypt, base64url, compactDecrypt } from "jose";

const asked = JSON.parse(await text(process.stdin));
const key = base64url.decode(asked.key);
if (asked.token) {
  const { plaintext } = await compactDecrypt(asked.token, key);
  process.stdout.write(plaintext);
} else {
  const token = new CompactEncrypt(new TextEncoder().encode(asked.plaintext)).setProtectedHeader(asked.header);
  process.stdout.write(await token.encrypt(key));
}
