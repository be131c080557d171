//! The block device over layers.
#![no_main]

use dormouse_fuzz::{
    Input, Subject, file,
    rig::{BUFFERS, Rig, Ring, put},
    run,
};
use libfuzzer_sys::fuzz_target;
use virtio_devices::{
    block::{Block, layers::Disk},
    device::Memory,
};

const DISK_BYTES: u64 = 256 * 1024 + 512;
const KINDS: [u32; 8] = [0, 1, 0, 1, 4, 8, 11, 13];

#[derive(Default)]
struct Layered {
    base: Option<std::fs::File>,
    sealed: Vec<(std::fs::File, std::fs::File)>,
    top: Option<std::fs::File>,
}

fn again(file: &std::fs::File) -> std::fs::File {
    file.try_clone().unwrap()
}

impl Layered {
    fn give_disk(&mut self, rig: &mut Rig) {
        let base = self.base.get_or_insert_with(|| {
            let base = file();
            base.set_len(DISK_BYTES).unwrap();
            base
        });
        let sealed = self.sealed.iter().map(|(data, map)| (again(data), again(map))).collect();
        let top = self.top.insert(file());
        rig.transport.device_as::<Block>().unwrap().set_disk(Disk::layered(again(base), sealed, again(top)).unwrap()).unwrap();
    }
}

impl Subject for Layered {
    fn queues(&self) -> u32 {
        1
    }

    fn rig(&mut self, memory: Memory) -> Rig {
        let mut rig = Rig::new(memory, |watch| Box::new(Block::new(DISK_BYTES, watch, || Ok(())).unwrap()));
        if self.top.is_none() {
            self.give_disk(&mut rig);
        }
        rig
    }

    /// A request that is right but for one thing or two.
    fn own(&mut self, rig: &mut Rig, rings: &mut [Ring], input: &mut Input<'_>) {
        if input.u8() % 16 == 0 {
            rig.transport.pause();
            let _ = rig.transport.device_as::<Block>().unwrap().merge(&mut || input.u8() % 4 == 0);
            rig.transport.resume();
            return;
        }
        let at = BUFFERS + u64::from(input.u8() % 8) * 0x2000;
        let kind = if input.u8() % 16 == 0 { input.u32() } else { KINDS[usize::from(input.u8() % 8)] };
        let sector = if input.u8() % 8 == 0 { input.u64() } else { u64::from(input.u16() % 514) };
        put(&rig.memory, at, &[&kind.to_le_bytes()[..], &[0; 4], &sector.to_le_bytes()].concat());
        let ring = &mut rings[0];
        let writable = kind == 0 || kind == 8;
        let len = match input.u8() % 4 {
            0 => u32::from(input.u16()),
            1 => 16 * u32::from(input.u8() % 4),
            _ => 512 * u32::from(input.u8() % 12),
        };
        if kind == 11 || kind == 13 {
            let range = [&u64::from(input.u16() % 514).to_le_bytes()[..], &u32::from(input.u8()).to_le_bytes(), &u32::from(input.u8() % 3).to_le_bytes()];
            put(&rig.memory, at + 0x800, &range.concat());
        }
        let first = u16::from(input.u8());
        let place = |n: u16| (first + n) % ring.size;
        ring.describe(&rig.memory, place(0), at, 16, 1, place(1));
        ring.describe(&rig.memory, place(1), at + 0x800, len, if writable { 3 } else { 1 }, place(2));
        ring.describe(&rig.memory, place(2), at + 16, 1, 2, 0);
        ring.offer(&rig.memory, place(0));
        rig.kick(&rings[0]);
    }

    fn moved(&mut self, old: &mut Rig, new: &mut Rig) {
        let map = file();
        let block = old.transport.device_as::<Block>().unwrap();
        block.seal(Some(&map)).unwrap();
        if block.sealed_layers().unwrap() == 0 {
            self.sealed.clear();
        }
        self.sealed.push((self.top.take().unwrap(), map));
        self.give_disk(new);
    }

    fn behave(&mut self, rig: &mut Rig, rings: &mut [Ring]) -> Option<usize> {
        put(&rig.memory, BUFFERS, &[0; 16]);
        rings[0].add(&rig.memory, &[(BUFFERS, 16, false), (BUFFERS + 0x1000, 4096, true), (BUFFERS + 16, 1, true)]);
        rig.kick(&rings[0]);
        Some(0)
    }
}

fuzz_target!(|data: &[u8]| run(&mut Layered::default(), data));
