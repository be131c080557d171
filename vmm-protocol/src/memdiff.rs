//! The memory difference: the pages of one microVM that are not those of its image.
//!
//! ```text
//! 0      header, one page: magic, version, counts, checksum of the table; checksum of the header in its last 4 bytes
//! 4096   payload: the data pages, in ascending order
//! …      table: the runs (first page u32, pages u32, kind u32), then the CRC-32 of each MiB of payload
//! ```
//! All numbers are little-endian. A run is of data (its pages follow those of the run before in the payload) or of
//! zeros (no payload; needed where the image holds something else). Runs ascend and do not touch what they do not own,
//! and the file is exactly as long as the header says: nothing in it is unchecked.

use std::io::{self, Read, Seek, SeekFrom, Write};

/// Bytes of a page.
pub const PAGE: usize = 4096;
const PAGE_U64: u64 = PAGE as u64;

const MAGIC: [u8; 8] = *b"dormdiff";
const VERSION: u32 = 1;
/// Payload bytes under one checksum.
const BLOCK: usize = 1 << 20;
const BLOCK_PAGES: u64 = (BLOCK / PAGE) as u64;
const RUN_BYTES: u64 = 12;
const CRC_BYTES: u64 = 4;

static ZEROS: [u8; BLOCK] = [0; BLOCK];

/// What a run holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// Pages in the payload.
    Data,
    /// Zeros.
    Zero,
}

/// Consecutive pages of one kind.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Run {
    /// Index of the first page.
    pub first: u32,
    /// How many; not zero.
    pub pages: u32,
    /// What they hold.
    pub kind: Kind,
}

impl Run {
    fn end(&self) -> u64 {
        u64::from(self.first) + u64::from(self.pages)
    }
}

/// Why a difference was not taken.
#[derive(Debug, thiserror::Error)]
pub enum DiffError {
    /// It is not what was written.
    #[error("the memory difference is damaged: {0}")]
    Damaged(String),
    /// It is for a guest of another size.
    #[error("the memory difference is for {found} pages of memory, not for {wanted}")]
    OtherSize {
        /// What it is for.
        found: u64,
        /// What it should be for.
        wanted: u64,
    },
    /// It could not be read.
    #[error("the memory difference cannot be read")]
    Read(#[source] io::Error),
    /// A page could not be put where it belongs.
    #[error("a page of the memory difference cannot be put into the guest")]
    Sink(#[source] io::Error),
}

fn damaged(what: impl Into<String>) -> DiffError {
    DiffError::Damaged(what.into())
}

/// What a [`Writer`] wrote.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Written {
    /// Length of the file.
    pub bytes: u64,
    /// Pages with data.
    pub data_pages: u64,
    /// Checksum of the header, which binds everything else.
    pub header_crc32: u32,
}

/// Writes a difference. Pages come in ascending order.
pub struct Writer<W> {
    out: W,
    memory_pages: u64,
    runs: Vec<Run>,
    crcs: Vec<u32>,
    block: crc32fast::Hasher,
    data_pages: u64,
}

impl<W: Write + Seek> Writer<W> {
    /// An empty difference of a guest with `memory_pages` pages. `out` is at the start of an empty file.
    pub fn new(mut out: W, memory_pages: u64) -> io::Result<Self> {
        out.write_all(&ZEROS[..PAGE])?;
        Ok(Self { out, memory_pages, runs: Vec::new(), crcs: Vec::new(), block: crc32fast::Hasher::new(), data_pages: 0 })
    }

    /// Adds pages that differ: `bytes` is a whole number of them, beginning at page `first`.
    pub fn pages(&mut self, first: u64, bytes: &[u8]) -> io::Result<()> {
        let last_end = self.runs.last().map_or(0, Run::end);
        let pages = (bytes.len() / PAGE) as u64;
        if !bytes.len().is_multiple_of(PAGE) || first < last_end || first + pages > self.memory_pages {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, "pages out of order, out of range or not whole"));
        }
        for (index, page) in (first..).zip(bytes.chunks_exact(PAGE)) {
            if page == &ZEROS[..PAGE] {
                self.extend(index, Kind::Zero)?;
            } else {
                self.extend(index, Kind::Data)?;
                self.out.write_all(page)?;
                self.block.update(page);
                self.data_pages += 1;
                if self.data_pages.is_multiple_of(BLOCK_PAGES) {
                    self.end_block();
                }
            }
        }
        Ok(())
    }

    fn end_block(&mut self) {
        self.crcs.push(std::mem::take(&mut self.block).finalize());
    }

    fn extend(&mut self, page: u64, kind: Kind) -> io::Result<()> {
        match self.runs.last_mut() {
            Some(run) if run.kind == kind && run.end() == page => run.pages += 1,
            _ => {
                let first = u32::try_from(page).map_err(|_| io::Error::new(io::ErrorKind::InvalidInput, "more than 16 TiB of memory"))?;
                self.runs.push(Run { first, pages: 1, kind });
            }
        }
        Ok(())
    }

    /// Writes table and header. The caller syncs the file.
    pub fn finish(mut self) -> io::Result<(W, Written)> {
        if !self.data_pages.is_multiple_of(BLOCK_PAGES) {
            self.end_block();
        }
        let mut table = Vec::with_capacity(self.runs.len() * RUN_BYTES as usize + self.crcs.len() * CRC_BYTES as usize);
        for run in &self.runs {
            table.extend(run.first.to_le_bytes());
            table.extend(run.pages.to_le_bytes());
            table.extend(u32::from(run.kind == Kind::Zero).to_le_bytes());
        }
        for crc in &self.crcs {
            table.extend(crc.to_le_bytes());
        }
        self.out.write_all(&table)?;
        let header = Header { memory_pages: self.memory_pages, data_pages: self.data_pages, runs: self.runs.len() as u64, table_crc32: crc32fast::hash(&table) };
        let (page, header_crc32) = header.encode();
        self.out.seek(SeekFrom::Start(0))?;
        self.out.write_all(&page)?;
        self.out.flush()?;
        Ok((self.out, Written { bytes: header.file_bytes(), data_pages: self.data_pages, header_crc32 }))
    }
}

#[derive(Debug, Clone, Copy)]
struct Header {
    memory_pages: u64,
    data_pages: u64,
    runs: u64,
    table_crc32: u32,
}

impl Header {
    fn blocks(&self) -> u64 {
        self.data_pages.div_ceil(BLOCK_PAGES)
    }

    fn table_bytes(&self) -> u64 {
        self.runs * RUN_BYTES + self.blocks() * CRC_BYTES
    }

    fn file_bytes(&self) -> u64 {
        PAGE_U64 + self.data_pages * PAGE_U64 + self.table_bytes()
    }

    fn encode(&self) -> (Vec<u8>, u32) {
        let mut page = Vec::with_capacity(PAGE);
        page.extend(MAGIC);
        page.extend(VERSION.to_le_bytes());
        page.extend(self.table_crc32.to_le_bytes());
        page.extend(self.memory_pages.to_le_bytes());
        page.extend(self.data_pages.to_le_bytes());
        page.extend(self.runs.to_le_bytes());
        page.resize(PAGE - 4, 0);
        let crc = crc32fast::hash(&page);
        page.extend(crc.to_le_bytes());
        (page, crc)
    }

    fn decode(page: &[u8; PAGE]) -> Result<(Self, u32), DiffError> {
        let u32_at = |at: usize| u32::from_le_bytes(page[at..at + 4].try_into().expect("four bytes"));
        let u64_at = |at: usize| u64::from_le_bytes(page[at..at + 8].try_into().expect("eight bytes"));
        if page[..8] != MAGIC {
            return Err(damaged("it is no memory difference"));
        }
        let crc = u32_at(PAGE - 4);
        if crc32fast::hash(&page[..PAGE - 4]) != crc {
            return Err(damaged("the checksum of its header is wrong"));
        }
        if u32_at(8) != VERSION {
            return Err(damaged(format!("it is of version {}, and this program reads version {VERSION}", u32_at(8))));
        }
        let header = Self { table_crc32: u32_at(12), memory_pages: u64_at(16), data_pages: u64_at(24), runs: u64_at(32) };
        Ok((header, crc))
    }
}

/// Reads a difference. Everything but the payload is checked by [`Reader::open`]; the payload as it is applied.
#[derive(Debug)]
pub struct Reader<R> {
    file: R,
    runs: Vec<Run>,
    crcs: Vec<u32>,
    data_pages: u64,
    header_crc32: u32,
}

impl<R: Read + Seek> Reader<R> {
    /// Reads and checks header and table. `memory_pages` is what the guest has.
    pub fn open(mut file: R, memory_pages: u64) -> Result<Self, DiffError> {
        let length = file.seek(SeekFrom::End(0)).map_err(DiffError::Read)?;
        file.seek(SeekFrom::Start(0)).map_err(DiffError::Read)?;
        if length < PAGE_U64 {
            return Err(damaged(format!("it has {length} bytes, less than its header")));
        }
        let mut page = [0; PAGE];
        file.read_exact(&mut page).map_err(DiffError::Read)?;
        let (header, header_crc32) = Header::decode(&page)?;
        if header.memory_pages != memory_pages {
            return Err(DiffError::OtherSize { found: header.memory_pages, wanted: memory_pages });
        }
        // These bounds keep the sums below from overflowing, and what is allocated within a few bytes per guest page.
        if memory_pages > u64::from(u32::MAX) || header.data_pages > memory_pages || header.runs > memory_pages {
            return Err(damaged("it claims more pages than the guest has"));
        }
        if length != header.file_bytes() {
            return Err(damaged(format!("it has {length} bytes and should have {}", header.file_bytes())));
        }
        let mut table = vec![0; usize::try_from(header.table_bytes()).map_err(|_| damaged("its table is too long"))?];
        file.seek(SeekFrom::Start(PAGE_U64 + header.data_pages * PAGE_U64)).map_err(DiffError::Read)?;
        file.read_exact(&mut table).map_err(DiffError::Read)?;
        if crc32fast::hash(&table) != header.table_crc32 {
            return Err(damaged("the checksum of its table is wrong"));
        }
        let numbers: Vec<u32> = table.chunks_exact(4).map(|bytes| u32::from_le_bytes(bytes.try_into().expect("four bytes"))).collect();
        let (runs, crcs) = numbers.split_at((header.runs * RUN_BYTES / 4) as usize);
        let runs = check_runs(runs, &header)?;
        Ok(Self { file, runs, crcs: crcs.to_vec(), data_pages: header.data_pages, header_crc32 })
    }

    /// See [`Written::header_crc32`].
    pub fn header_crc32(&self) -> u32 {
        self.header_crc32
    }

    /// The file, at no particular position.
    pub fn into_file(self) -> R {
        self.file
    }

    /// What it holds.
    pub fn runs(&self) -> &[Run] {
        &self.runs
    }

    /// Gives every page to `sink(offset in memory, bytes)`, each piece after its checksum was found right. After an
    /// error the guest's memory is a mixture and must not run.
    pub fn apply(&mut self, mut sink: impl FnMut(u64, &[u8]) -> io::Result<()>) -> Result<(), DiffError> {
        self.file.seek(SeekFrom::Start(PAGE_U64)).map_err(DiffError::Read)?;
        let mut payload = Payload { file: &mut self.file, crcs: self.crcs.iter(), pages_left: self.data_pages, block: Vec::new(), at: 0 };
        for run in &self.runs {
            let mut offset = u64::from(run.first) * PAGE_U64;
            let mut left = run.pages as usize * PAGE;
            while left > 0 {
                let bytes = match run.kind {
                    Kind::Data => payload.next(left)?,
                    Kind::Zero => &ZEROS[..left.min(BLOCK)],
                };
                sink(offset, bytes).map_err(DiffError::Sink)?;
                offset += bytes.len() as u64;
                left -= bytes.len();
            }
        }
        Ok(())
    }
}

fn check_runs(numbers: &[u32], header: &Header) -> Result<Vec<Run>, DiffError> {
    let mut runs = Vec::with_capacity(numbers.len() / 3);
    let (mut end, mut data_pages) = (0, 0);
    for number in numbers.chunks_exact(3) {
        let kind = match number[2] {
            0 => Kind::Data,
            1 => Kind::Zero,
            other => return Err(damaged(format!("it has a run of kind {other}"))),
        };
        let run = Run { first: number[0], pages: number[1], kind };
        if run.pages == 0 || u64::from(run.first) < end || run.end() > header.memory_pages {
            return Err(damaged("its runs overlap, are empty or leave the guest's memory"));
        }
        end = run.end();
        if kind == Kind::Data {
            data_pages += u64::from(run.pages);
        }
        runs.push(run);
    }
    if data_pages != header.data_pages {
        return Err(damaged("its runs and its payload disagree"));
    }
    Ok(runs)
}

/// The payload, one checked block at a time.
struct Payload<'a, R> {
    file: &'a mut R,
    crcs: std::slice::Iter<'a, u32>,
    pages_left: u64,
    block: Vec<u8>,
    at: usize,
}

impl<R: Read> Payload<'_, R> {
    /// The next bytes, at most `wanted` of them and at least one page.
    fn next(&mut self, wanted: usize) -> Result<&[u8], DiffError> {
        if self.at == self.block.len() {
            let pages = self.pages_left.min(BLOCK_PAGES);
            self.pages_left -= pages;
            self.block.resize(pages as usize * PAGE, 0);
            self.at = 0;
            self.file.read_exact(&mut self.block).map_err(DiffError::Read)?;
            if pages == 0 || self.crcs.next() != Some(&crc32fast::hash(&self.block)) {
                return Err(damaged("the checksum of its pages is wrong"));
            }
        }
        let from = self.at;
        self.at = self.block.len().min(from + wanted);
        Ok(&self.block[from..self.at])
    }
}

#[cfg(test)]
mod tests {
    use std::{collections::BTreeMap, io::Cursor};

    use proptest::prelude::*;

    use super::*;

    const MEMORY_PAGES: u64 = 2048;

    fn write(pages: &BTreeMap<u64, u8>) -> (Vec<u8>, Written) {
        let mut writer = Writer::new(Cursor::new(Vec::new()), MEMORY_PAGES).unwrap();
        for (page, fill) in pages {
            writer.pages(*page, &[*fill; PAGE]).unwrap();
        }
        let (out, written) = writer.finish().unwrap();
        (out.into_inner(), written)
    }

    fn read(bytes: &[u8]) -> Result<BTreeMap<u64, u8>, DiffError> {
        let mut found = BTreeMap::new();
        Reader::open(Cursor::new(bytes), MEMORY_PAGES)?.apply(|offset, bytes| {
            for (page, content) in (offset / PAGE_U64..).zip(bytes.chunks_exact(PAGE)) {
                assert!(content.iter().all(|byte| *byte == content[0]));
                assert!(found.insert(page, content[0]).is_none());
            }
            Ok(())
        })?;
        Ok(found)
    }

    #[test]
    fn zero_pages_cost_nothing_and_are_kept() {
        let pages: BTreeMap<u64, u8> = (0..MEMORY_PAGES).map(|page| (page, 0)).collect();
        let (bytes, written) = write(&pages);
        assert_eq!(written, Written { bytes: bytes.len() as u64, data_pages: 0, header_crc32: written.header_crc32 });
        assert!(bytes.len() < 2 * PAGE);
        assert_eq!(read(&bytes).unwrap(), pages);
    }

    #[test]
    fn blocks_that_end_within_a_run_are_joined() {
        let pages: BTreeMap<u64, u8> = (100..100 + 3 * BLOCK_PAGES + 1).map(|page| (page, page as u8 | 1)).collect();
        assert_eq!(read(&write(&pages).0).unwrap(), pages);
    }

    #[test]
    fn a_guest_of_another_size_is_refused() {
        let (bytes, _) = write(&BTreeMap::from([(1, 1)]));
        assert!(matches!(Reader::open(Cursor::new(bytes), 4), Err(DiffError::OtherSize { found: MEMORY_PAGES, wanted: 4 })));
    }

    #[test]
    fn a_writer_refuses_pages_that_go_back() {
        let mut writer = Writer::new(Cursor::new(Vec::new()), MEMORY_PAGES).unwrap();
        writer.pages(5, &[1; PAGE]).unwrap();
        for first in [5, 4, MEMORY_PAGES] {
            assert!(writer.pages(first, &[1; PAGE]).is_err());
        }
        assert!(writer.pages(6, &[1; 100]).is_err());
    }

    /// A header and table that are self-consistent but hold what an attacker likes.
    fn forged(memory_pages: u64, data_pages: u64, numbers: &[u32]) -> Vec<u8> {
        let mut table: Vec<u8> = numbers.iter().flat_map(|number| number.to_le_bytes()).collect();
        let payload = vec![7; (data_pages as usize).min(600) * PAGE];
        table.extend(payload.chunks(BLOCK).flat_map(|block| crc32fast::hash(block).to_le_bytes()));
        let header = Header { memory_pages, data_pages, runs: numbers.len() as u64 / 3, table_crc32: crc32fast::hash(&table) };
        [header.encode().0, payload, table].concat()
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]

        #[test]
        fn what_was_written_is_read(pages in proptest::collection::btree_map(0..MEMORY_PAGES, 0u8..3, 0..600)) {
            let (bytes, written) = write(&pages);
            prop_assert_eq!(written.bytes, bytes.len() as u64);
            prop_assert_eq!(written.data_pages, pages.values().filter(|fill| **fill != 0).count() as u64);
            prop_assert_eq!(read(&bytes).unwrap(), pages);
        }

        #[test]
        fn every_flipped_bit_is_noticed(
            pages in proptest::collection::btree_map(0..MEMORY_PAGES, 0u8..3, 1..40),
            at in any::<prop::sample::Index>(),
            bit in 0..8,
        ) {
            let (mut bytes, _) = write(&pages);
            let at = at.index(bytes.len());
            bytes[at] ^= 1u8 << bit;
            prop_assert!(read(&bytes).is_err());
        }

        #[test]
        fn every_other_length_is_noticed(pages in proptest::collection::btree_map(0..MEMORY_PAGES, 0u8..3, 1..40), length in any::<prop::sample::Index>()) {
            let (mut bytes, _) = write(&pages);
            bytes.truncate(length.index(bytes.len()));
            prop_assert!(read(&bytes).is_err());
        }

        #[test]
        fn forged_tables_never_panic_nor_leave_the_memory(
            memory_pages in prop_oneof![Just(MEMORY_PAGES), any::<u64>()],
            data_pages in prop_oneof![0u64..20, any::<u64>()],
            numbers in proptest::collection::vec(prop_oneof![0u32..3, 0u32..2100, any::<u32>()], 0..30),
        ) {
            let bytes = forged(memory_pages, data_pages, &numbers[..numbers.len() / 3 * 3]);
            if let Ok(mut reader) = Reader::open(Cursor::new(bytes), MEMORY_PAGES) {
                let mut end = 0;
                let _ = reader.apply(|offset, bytes| {
                    assert!(offset >= end && offset + bytes.len() as u64 <= MEMORY_PAGES * PAGE_U64);
                    end = offset + bytes.len() as u64;
                    Ok(())
                });
            }
        }

        #[test]
        fn any_bytes_are_refused_without_a_panic(bytes in proptest::collection::vec(any::<u8>(), 0..9000)) {
            prop_assert!(Reader::open(Cursor::new(bytes), MEMORY_PAGES).is_err());
        }
    }
}
