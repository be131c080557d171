//! The frame decoder of the agent's channel.
#![no_main]

use bytes::BytesMut;
use dormouse_fuzz::{Input, channel};
use libfuzzer_sys::fuzz_target;
use protocol::frame::{Assembler, Decoded, Decoder, Frame, MARKER, MAX_FRAME, MAX_MESSAGE, padding, put_message};

fuzz_target!(|data: &[u8]| {
    let mut input = Input(data);
    let how = input.u8();
    let mut wire = BytesMut::new();
    // What must come out as long as no noise was sent.
    let mut expected = Vec::new();
    let mut clean = how & 1 == 0;
    if how & 2 == 0 {
        wire.extend_from_slice(input.0);
        clean = false;
    } else {
        while !input.is_empty() && wire.len() < 1 << 19 {
            match input.u8() % 16 {
                0 => {
                    wire.extend_from_slice(&input.bytes(64));
                    clean = false;
                }
                1 => {
                    wire.extend_from_slice(&MARKER);
                    expected.extend(clean.then_some(Decoded::Marker));
                }
                2 => {
                    wire.extend_from_slice(padding());
                    clean = false;
                }
                3 => {
                    wire.truncate(wire.len() - usize::from(input.u16()).min(wire.len()));
                    clean = false;
                }
                4 => {
                    let at = usize::from(input.u16());
                    let flip = input.u8();
                    if let Some(byte) = wire.get_mut(at) {
                        *byte ^= flip;
                    }
                    clean = false;
                }
                5 => {
                    let message = vec![input.u8(); usize::from(input.u16()) * 2];
                    assert!(put_message(&mut wire, protocol::frame::Kind::Control, &message));
                    clean = false;
                }
                _ => {
                    let (kind, stream, payload) = channel::frame(&mut input, &mut wire);
                    expected.extend(clean.then_some(Decoded::Frame(Frame { kind, stream, more: false, payload: payload.into() })));
                }
            }
        }
    }
    let clean = clean && how & 4 == 0;
    let mut decoder = if how & 4 == 0 { Decoder::new() } else { Decoder::seeking() };
    let mut messages = Assembler::default();
    let mut found = Vec::new();
    let mut cut = usize::from(how >> 3) * 1500 + 1;
    let mut rest = &wire[..];
    while !rest.is_empty() {
        let (now, later) = rest.split_at(cut.min(rest.len()));
        decoder.buffer().extend_from_slice(now);
        rest = later;
        cut = cut % 4099 * 3 + 1;
        while let Some(decoded) = decoder.next() {
            if let Decoded::Frame(frame) = &decoded
                && let Ok(Some(message)) = messages.push(frame.clone())
            {
                assert!(message.len() <= MAX_MESSAGE);
            }
            if clean {
                found.push(decoded);
            }
        }
        assert!(decoder.buffer().len() < MAX_FRAME, "more is held than one incomplete frame");
    }
    if clean {
        assert!(found == expected, "what was sent did not arrive");
    }
});
