//! The copy-on-write disk against a plain vector, and the map file against damage.

use std::{
    fs::File,
    os::unix::fs::{FileExt, MetadataExt},
};

use proptest::prelude::*;
use virtio_devices::block::{
    layers::{Disk, Merged},
    map::{BLOCK_BYTES, Blocks},
};

/// Not a multiple of the block: the last block of the disk is short.
const DISK_BYTES: u64 = 40 * BLOCK_BYTES + 1536;

fn file() -> File {
    tempfile::tempfile().unwrap()
}

fn again(file: &File) -> File {
    file.try_clone().unwrap()
}

#[derive(Debug, Clone)]
enum Step {
    Write { offset: u64, len: u64, byte: u8 },
    Zero { offset: u64, len: u64 },
    Discard { offset: u64, len: u64 },
    Seal,
    SealAndGoOn,
    Merge { pieces: usize },
}

fn range() -> impl Strategy<Value = (u64, u64)> {
    // Sector-aligned as from a driver, or anything at all.
    let aligned = (0..DISK_BYTES / 512).prop_flat_map(|first| (Just(first * 512), (1..=(DISK_BYTES / 512 - first).min(64)).prop_map(|n| n * 512)));
    let any = (0..DISK_BYTES).prop_flat_map(|offset| (Just(offset), 1..=(DISK_BYTES - offset).min(20_000)));
    prop_oneof![3 => aligned, 1 => any]
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        6 => (range(), 1..=255_u8).prop_map(|((offset, len), byte)| Step::Write { offset, len, byte }),
        2 => range().prop_map(|(offset, len)| Step::Zero { offset, len }),
        2 => range().prop_map(|(offset, len)| Step::Discard { offset, len }),
        2 => Just(Step::Seal),
        1 => Just(Step::SealAndGoOn),
        1 => (0..4_usize).prop_map(|pieces| Step::Merge { pieces }),
    ]
}

/// A disk and what must be on it.
struct Both {
    base: File,
    sealed: Vec<(File, File)>,
    top: File,
    disk: Disk,
    model: Vec<u8>,
}

impl Both {
    fn new() -> Self {
        let model: Vec<u8> = (0..DISK_BYTES).map(|at| (at / 512 % 251 + 1) as u8).collect();
        let (base, top) = (file(), file());
        base.write_all_at(&model, 0).unwrap();
        let disk = Disk::layered(again(&base), Vec::new(), again(&top)).unwrap();
        Self { base, sealed: Vec::new(), top, disk, model }
    }

    fn content(&self) -> Vec<u8> {
        let mut content = vec![0; DISK_BYTES as usize];
        self.disk.read(0, &mut content).unwrap();
        content
    }

    /// Every clone of the disk from its files must be the same disk.
    fn reopen(&mut self, map: File) {
        if self.disk.sealed_layers() == 0 {
            self.sealed.clear();
        }
        self.sealed.push((std::mem::replace(&mut self.top, file()), map));
        let sealed = self.sealed.iter().map(|(data, map)| (again(data), again(map))).collect();
        self.disk = Disk::layered(again(&self.base), sealed, again(&self.top)).unwrap();
    }

    fn step(&mut self, step: &Step) {
        match *step {
            Step::Write { offset, len, byte } => {
                let data: Vec<u8> = (0..len).map(|at| byte.wrapping_add(at as u8)).collect();
                self.disk.write(offset, &data).unwrap();
                self.model[offset as usize..][..len as usize].copy_from_slice(&data);
            }
            Step::Zero { offset, len } => {
                self.disk.zero(offset, len).unwrap();
                self.model[offset as usize..][..len as usize].fill(0);
            }
            Step::Discard { offset, len } => {
                self.disk.discard(offset, len).unwrap();
                // Undefined content inside the range, and only there: take over what the disk made of it.
                let content = self.content();
                let (from, to) = (offset as usize, (offset + len) as usize);
                for (at, (new, old)) in content[from..to].iter().zip(&self.model[from..to]).enumerate() {
                    assert!(*new == 0 || new == old, "discarding made byte {} neither zero nor what it was", from + at);
                }
                self.model[from..to].copy_from_slice(&content[from..to]);
            }
            Step::Seal => {
                let map = file();
                let crc = self.disk.seal(Some(&map)).unwrap().unwrap();
                let mut bytes = vec![0; map.metadata().unwrap().len() as usize];
                map.read_exact_at(&mut bytes, 0).unwrap();
                assert_eq!(crc32fast::hash(&bytes), crc);
                self.reopen(map);
            }
            Step::SealAndGoOn => {
                self.disk.seal(Some(&file())).unwrap();
            }
            Step::Merge { pieces } => {
                let mut left = pieces;
                let ended = self.disk.merge(&mut || {
                    left = left.saturating_sub(1);
                    left == 0
                });
                match ended.unwrap() {
                    Merged::Wholly => assert_eq!(self.disk.sealed_layers(), 0),
                    Merged::Cancelled => assert!(pieces <= 1 || left == 0),
                }
            }
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn the_disk_is_what_was_written(steps in prop::collection::vec(step(), 1..40), (offset, len) in range()) {
        let mut both = Both::new();
        let base = both.model.clone();
        for step in &steps {
            both.step(step);
            prop_assert!(both.content() == both.model, "differs after {:?}", step);
        }
        let mut part = vec![0; len as usize];
        both.disk.read(offset, &mut part).unwrap();
        prop_assert_eq!(&part[..], &both.model[offset as usize..][..len as usize]);

        // Wholly merged, the base and one layer are enough.
        prop_assert_eq!(both.disk.merge(&mut || false).unwrap(), Merged::Wholly);
        let map = file();
        both.disk.seal(Some(&map)).unwrap();
        both.reopen(map);
        prop_assert_eq!(both.sealed.len(), 1);
        prop_assert!(both.content() == both.model);
        let mut untouched = vec![0; DISK_BYTES as usize];
        both.base.read_exact_at(&mut untouched, 0).unwrap();
        prop_assert!(untouched == base, "the base was written");
    }

    #[test]
    fn a_set_of_blocks_survives_its_file(runs in prop::collection::vec((0..5000_u64, 1..300_u64), 0..60)) {
        let disk_bytes = 5000 * BLOCK_BYTES + 512;
        let (mut blocks, mut model) = (Blocks::none(disk_bytes), vec![false; 5001]);
        for (first, count) in runs {
            let count = count.min(5001 - first);
            blocks.insert(first, count);
            model[first as usize..(first + count) as usize].fill(true);
        }
        for (block, &held) in model.iter().enumerate() {
            prop_assert_eq!(blocks.contains(block as u64), held);
            let same = model[block..].iter().take_while(|&&other| other == held).count() as u64;
            prop_assert_eq!(blocks.run(block as u64, u64::MAX - block as u64), (held, same));
            prop_assert_eq!(blocks.run(block as u64, 3), (held, same.min(3)));
        }
        let map = file();
        blocks.write(&map).unwrap();
        prop_assert_eq!(Blocks::read(&map, disk_bytes).unwrap(), blocks);
    }

    #[test]
    fn a_damaged_map_is_refused(runs in prop::collection::vec((0..900_u64, 1..20_u64), 1..40), damage in any::<prop::sample::Index>(), bit in 0..8_u32, cut in any::<prop::sample::Index>()) {
        let disk_bytes = 920 * BLOCK_BYTES;
        let mut blocks = Blocks::none(disk_bytes);
        for (first, count) in runs {
            blocks.insert(first, count);
        }
        let map = file();
        blocks.write(&map).unwrap();
        let mut bytes = vec![0; map.metadata().unwrap().len() as usize];
        map.read_exact_at(&mut bytes, 0).unwrap();

        let flipped = file();
        let mut wrong = bytes.clone();
        wrong[damage.index(bytes.len())] ^= 1 << bit;
        flipped.write_all_at(&wrong, 0).unwrap();
        prop_assert!(Blocks::read(&flipped, disk_bytes).is_err());

        let short = file();
        short.write_all_at(&bytes[..cut.index(bytes.len())], 0).unwrap();
        prop_assert!(Blocks::read(&short, disk_bytes).is_err());

        let long = file();
        bytes.push(0);
        long.write_all_at(&bytes, 0).unwrap();
        prop_assert!(Blocks::read(&long, disk_bytes).is_err());
    }

    #[test]
    fn any_bytes_are_no_map(bytes in prop::collection::vec(any::<u8>(), 0..200), lie in any::<u64>()) {
        let map = file();
        map.write_all_at(&bytes, 0).unwrap();
        prop_assert!(Blocks::read(&map, 1 << 30).is_err());
        // A header that is right in all but what it says of the table.
        Blocks::none(1 << 30).write(&map).unwrap();
        map.set_len(40).unwrap();
        map.write_all_at(&lie.max(1).to_le_bytes(), 32).unwrap();
        prop_assert!(Blocks::read(&map, 1 << 30).is_err());
    }
}

#[test]
fn a_refusal_is_a_sentence_that_names_the_layer() {
    let (base, data, map) = (file(), file(), file());
    base.set_len(DISK_BYTES).unwrap();
    data.set_len(DISK_BYTES).unwrap();
    Blocks::none(DISK_BYTES + 512).write(&map).unwrap();
    let refused = Disk::layered(again(&base), vec![(again(&data), map)], file()).unwrap_err().to_string();
    assert_eq!(refused, format!("the map of sealed disk layer 0 cannot be used: it is for a disk of {} bytes, and this one has {DISK_BYTES}", DISK_BYTES + 512));

    let good = file();
    Blocks::none(DISK_BYTES).write(&good).unwrap();
    data.set_len(DISK_BYTES - 1).unwrap();
    let refused = Disk::layered(base, vec![(data, good)], file()).unwrap_err().to_string();
    assert_eq!(refused, format!("the data of sealed disk layer 0 has {} bytes instead of the disk's {DISK_BYTES}", DISK_BYTES - 1));
    assert!(Disk::raw(file()).unwrap_err().to_string().contains("a disk of 0 bytes is not possible"));
}

#[test]
fn ranges_beyond_the_end_are_refused_and_change_nothing() {
    let mut both = Both::new();
    for (offset, len) in [(DISK_BYTES, 1), (DISK_BYTES - 1, 2), (u64::MAX, 1), (u64::MAX - 511, 512)] {
        let mut data = vec![7; len as usize];
        both.disk.read(offset, &mut data).unwrap_err();
        both.disk.write(offset, &data).unwrap_err();
        both.disk.zero(offset, len).unwrap_err();
        both.disk.discard(offset, len).unwrap_err();
    }
    assert!(both.content() == both.model);
}

#[test]
fn layers_take_no_more_room_than_was_written() {
    let (base, top) = (file(), file());
    base.set_len(1 << 30).unwrap();
    let mut disk = Disk::layered(base, Vec::new(), again(&top)).unwrap();
    disk.write(512 << 20, &[1; 8192]).unwrap();
    disk.zero(0, 256 << 20).unwrap();
    assert_eq!(top.metadata().unwrap().len(), 1 << 30);
    assert!(top.metadata().unwrap().blocks() * 512 < 1 << 20, "a layer is sparse");
    assert_eq!(disk.top_bytes(), (256 << 20) + 8192);
    disk.discard(512 << 20, 8192).unwrap();
    let mut data = [1; 8192];
    disk.read(512 << 20, &mut data).unwrap();
    assert_eq!(data, [0; 8192]);
}

#[test]
fn a_raw_disk_is_written_in_place_and_has_nothing_to_seal_but_itself() {
    let disk_file = file();
    disk_file.set_len(1 << 20).unwrap();
    let mut disk = Disk::raw(again(&disk_file)).unwrap();
    disk.write(512, &[9; 1024]).unwrap();
    disk.zero(1024, 512).unwrap();
    disk.flush().unwrap();
    assert_eq!(disk.seal(None).unwrap(), None);
    disk.seal(Some(&file())).unwrap_err();
    let mut data = [1; 2048];
    disk_file.read_exact_at(&mut data, 0).unwrap();
    assert!(data[..512].iter().all(|&b| b == 0) && data[512..1024] == [9; 512] && data[1024..].iter().all(|&b| b == 0));
}
