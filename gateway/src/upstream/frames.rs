//! WebSocket frames as far as a tunnel must know them: where one ends and the next begins (RFC 6455 §5.2), and what a ping is.
//!
//! Owns: a scanner for each direction of a tunnel, and the pong to a ping. Never changes, checks or keeps the content of a
//! frame: what breaks the rules is passed on for the other side to judge.

/// Opcode of a ping, and of the pong that answers it (RFC 6455 §11.8).
const PING: u8 = 0x9;
const PONG: u8 = 0xA;
/// The longest payload of a control frame (RFC 6455 §5.5).
const CONTROL_PAYLOAD: usize = 125;
/// The longest header: two bytes, eight of length, a mask.
const LONGEST_HEADER: usize = 14;
const FIN: u8 = 0x80;
const RSV: u8 = 0x70;
const MASKED: u8 = 0x80;

/// The length of a frame's header, as soon as that can be known, and of its payload, once the header is whole.
fn measure(header: &[u8]) -> Option<(usize, Option<u64>)> {
    let second = *header.get(1)?;
    let (length_bytes, short) = match second & !MASKED {
        126 => (2, 0),
        127 => (8, 0),
        short => (0, u64::from(short)),
    };
    let whole = 2 + length_bytes + if second & MASKED == 0 { 0 } else { 4 };
    let payload = (header.len() >= whole).then(|| header[2..2 + length_bytes].iter().fold(short, |length, byte| length << 8 | u64::from(*byte)));
    Some((whole, payload))
}

/// Follows one direction of a tunnel, byte by byte.
#[derive(Debug, Clone, Default)]
pub(crate) struct Scanner {
    header: [u8; LONGEST_HEADER],
    /// Bytes of the header that have passed.
    passed: usize,
    /// Bytes of the payload that are still to come; only meaningful while `passed` is zero.
    payload_left: u64,
}

impl Scanner {
    /// Whether the next byte begins a frame.
    pub fn at_boundary(&self) -> bool {
        self.passed == 0 && self.payload_left == 0
    }

    /// These bytes have passed.
    pub fn pass(&mut self, mut bytes: &[u8]) {
        while !bytes.is_empty() {
            bytes = &bytes[self.step(bytes)..];
        }
    }

    /// How many of these bytes come before the first ping that begins among them; all, if none does.
    pub fn before_ping(&self, bytes: &[u8]) -> usize {
        let (mut ahead, mut at) = (self.clone(), 0);
        while at < bytes.len() && !(ahead.at_boundary() && begins_ping(bytes[at])) {
            at += ahead.step(&bytes[at..]);
        }
        at
    }

    /// Passes the next payload bytes, or the next byte of a header; `bytes` is not empty.
    fn step(&mut self, bytes: &[u8]) -> usize {
        if self.payload_left > 0 {
            let taken = bytes.len().min(usize::try_from(self.payload_left).unwrap_or(usize::MAX));
            self.payload_left -= taken as u64;
            return taken;
        }
        self.header[self.passed] = bytes[0];
        self.passed += 1;
        if let Some((whole, Some(payload))) = measure(&self.header[..self.passed])
            && whole == self.passed
        {
            self.passed = 0;
            self.payload_left = payload;
        }
        1
    }
}

fn begins_ping(first: u8) -> bool {
    first & !RSV == FIN | PING
}

/// What is known of a frame that begins like a ping.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Ping {
    /// More of it has to come.
    Incomplete,
    /// It is not one that a client may send; it is to be passed on.
    NotOne,
    /// It is whole; this answers it.
    Pong(Vec<u8>),
}

/// Looks at a frame that begins like a ping, as far as it is there.
pub(crate) fn answer(frame: &[u8]) -> Ping {
    let Some((whole, payload)) = measure(frame) else { return Ping::Incomplete };
    if frame[0] != FIN | PING || frame[1] & MASKED == 0 || usize::from(frame[1] & !MASKED) > CONTROL_PAYLOAD {
        return Ping::NotOne;
    }
    let Some(payload) = payload.and_then(|payload| usize::try_from(payload).ok()) else { return Ping::Incomplete };
    if frame.len() < whole + payload {
        return Ping::Incomplete;
    }
    let mask = &frame[2..6];
    let mut pong = vec![FIN | PONG, frame[1] & !MASKED];
    pong.extend(frame[whole..whole + payload].iter().zip(mask.iter().cycle()).map(|(byte, mask)| byte ^ mask));
    Ping::Pong(pong)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn frame(opcode: u8, payload: &[u8], mask: Option<[u8; 4]>) -> Vec<u8> {
        let mut frame = vec![FIN | opcode];
        let masked = if mask.is_some() { MASKED } else { 0 };
        match payload.len() {
            short @ 0..126 => frame.push(masked | short as u8),
            middle @ 126..65_536 => {
                frame.push(masked | 126);
                frame.extend((middle as u16).to_be_bytes());
            }
            long => {
                frame.push(masked | 127);
                frame.extend((long as u64).to_be_bytes());
            }
        }
        frame.extend(mask.into_iter().flatten());
        frame.extend(payload.iter().zip(mask.unwrap_or_default().iter().cycle()).map(|(byte, mask)| byte ^ mask));
        frame
    }

    #[test]
    fn boundaries_are_found_however_the_bytes_are_cut() {
        let frames: Vec<Vec<u8>> = [0, 1, 125, 126, 65_535, 65_536, 70_000]
            .into_iter()
            .flat_map(|length| [frame(1, &vec![7; length], None), frame(2, &vec![9; length], Some([1, 2, 3, 4]))])
            .collect();
        let (all, mut ends) = (frames.concat(), Vec::new());
        let mut end = 0;
        for frame in &frames {
            end += frame.len();
            ends.push(end);
        }
        for cut in [1, 2, 3, 7, 1000, all.len()] {
            let mut scanner = Scanner::default();
            let mut at = 0;
            for piece in all.chunks(cut) {
                scanner.pass(piece);
                at += piece.len();
                assert_eq!(scanner.at_boundary(), ends.contains(&at), "after {at} bytes in pieces of {cut}");
            }
        }
    }

    #[test]
    fn a_ping_is_found_between_frames_and_not_in_a_payload() {
        let text = frame(1, &[FIN | PING; 300], Some([0; 4]));
        let ping = frame(PING, b"hello", Some([5, 6, 7, 8]));
        let both = [text.clone(), ping.clone(), text.clone()].concat();
        let scanner = Scanner::default();
        assert_eq!(scanner.before_ping(&both), text.len());
        assert_eq!(scanner.before_ping(&text), text.len());
        assert_eq!(scanner.before_ping(&ping), 0);
        let mut inside = Scanner::default();
        inside.pass(&text[..100]);
        assert_eq!(inside.before_ping(&both[100..]), text.len() - 100);
    }

    #[test]
    fn a_pong_carries_the_payload_unmasked() {
        let ping = frame(PING, b"are you there?", Some([5, 6, 7, 8]));
        for cut in 1..ping.len() {
            assert_eq!(answer(&ping[..cut]), Ping::Incomplete, "{cut}");
        }
        assert_eq!(answer(&ping), Ping::Pong(frame(PONG, b"are you there?", None)));
        assert_eq!(answer(&frame(PING, &[1; CONTROL_PAYLOAD], Some([1; 4]))), Ping::Pong(frame(PONG, &[1; CONTROL_PAYLOAD], None)));
    }

    #[test]
    fn what_no_client_may_send_is_left_to_the_app() {
        assert_eq!(answer(&frame(PING, b"", None)), Ping::NotOne, "not masked");
        assert_eq!(answer(&frame(PING, &[0; 126], Some([1; 4]))), Ping::NotOne, "too long");
        let mut compressed = frame(PING, b"x", Some([1; 4]));
        compressed[0] |= 0x40;
        assert_eq!(answer(&compressed), Ping::NotOne, "a reserved bit");
    }
}
