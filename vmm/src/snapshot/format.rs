//! Sections in a file.
//!
//! ```text
//! 0   "dormstat", version of the form u32, number of sections u32
//! 16  tag u32, version of the section u16, flags u16, length u32, CRC-32 of the content u32, content; and so on
//! …   CRC-32 of everything before it, the most significant byte first
//! ```
//! All other numbers are little-endian. The file is exactly as long as its sections. It is semi-trusted: the node wrote it, but disks
//! rot and operators copy files; so every length is checked before it is believed, and nothing is allocated beyond what the
//! file's own, capped, length allows.

const MAGIC: &[u8; 8] = b"dormstat";
const VERSION: u32 = 2;
const HEADER: usize = 16;
const SECTION_HEADER: usize = 16;
const TRAILER: usize = 4;
/// A reader that does not know the section may go on without it.
const OPTIONAL: u16 = 1;

/// 16 vCPUs have some 20 KiB each, vsock's state is a few MiB at most (streams with their buffers).
pub const MAX_BYTES: u64 = 32 << 20;
/// 16 vCPUs, 5 devices and a handful more.
const MAX_SECTIONS: u32 = 64;

/// Why a state file was not taken.
#[derive(Debug, thiserror::Error)]
pub enum FormatError {
    /// It is not what was written.
    #[error("the state file is damaged: {0}")]
    Damaged(String),
    /// It was written by another version of this program.
    #[error("the state file is of form {found}, and this program reads form {VERSION}; restore it with the version that wrote it")]
    OtherForm {
        /// Which one.
        found: u32,
    },
    /// A section is not there.
    #[error("the state file lacks its section {name}")]
    Missing {
        /// Which one.
        name: String,
    },
    /// A section has a version that is not understood, or is unknown and may not be left out.
    #[error("the state file has a section {name} of version {version}, which this program does not understand; restore it with the version that wrote it")]
    NotUnderstood {
        /// Which one.
        name: String,
        /// Its version.
        version: u16,
    },
}

fn damaged(what: impl Into<String>) -> FormatError {
    FormatError::Damaged(what.into())
}

/// A tag as text.
pub fn name(tag: u32) -> String {
    tag.to_le_bytes().iter().map(|byte| if byte.is_ascii_graphic() { char::from(*byte).to_string() } else { format!("{byte}") }).collect()
}

/// The checksum of all of a file, for its end. The most significant byte first, unlike every other number in it: the CRC-32
/// of anything followed by its own CRC-32 in the usual order is the same number for all files, and what names this file in a
/// manifest is the CRC-32 of it.
fn seal(body: &[u8]) -> [u8; TRAILER] {
    crc32fast::hash(body).to_be_bytes()
}

/// Puts a file together.
#[derive(Debug, Default)]
pub struct Writer {
    sections: Vec<u8>,
    count: u32,
}

impl Writer {
    /// Adds a section that every reader must understand.
    pub fn section(&mut self, tag: u32, version: u16, content: &[u8]) {
        self.add(tag, version, 0, content);
    }

    /// Adds a section that a reader may leave out.
    pub fn optional_section(&mut self, tag: u32, version: u16, content: &[u8]) {
        self.add(tag, version, OPTIONAL, content);
    }

    fn add(&mut self, tag: u32, version: u16, flags: u16, content: &[u8]) {
        self.count += 1;
        self.sections.extend(tag.to_le_bytes());
        self.sections.extend(version.to_le_bytes());
        self.sections.extend(flags.to_le_bytes());
        self.sections.extend((content.len() as u32).to_le_bytes());
        self.sections.extend(crc32fast::hash(content).to_le_bytes());
        self.sections.extend(content);
    }

    /// The file.
    pub fn finish(self) -> Vec<u8> {
        let mut file = Vec::with_capacity(HEADER + self.sections.len() + TRAILER);
        file.extend(MAGIC);
        file.extend(VERSION.to_le_bytes());
        file.extend(self.count.to_le_bytes());
        file.extend(self.sections);
        file.extend(seal(&file));
        file
    }
}

/// A section of a file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Section<'a> {
    /// What it is of.
    pub tag: u32,
    /// Of its content.
    pub version: u16,
    /// Whether it may be left out.
    pub optional: bool,
    /// As written.
    pub content: &'a [u8],
}

impl Section<'_> {
    /// Refuses it.
    pub fn not_understood(&self) -> FormatError {
        FormatError::NotUnderstood { name: name(self.tag), version: self.version }
    }
}

/// A file, taken apart. All checksums were right.
#[derive(Debug)]
pub struct Sections<'a> {
    sections: Vec<Section<'a>>,
}

impl<'a> Sections<'a> {
    /// Takes a file apart.
    pub fn parse(file: &'a [u8]) -> Result<Self, FormatError> {
        if file.len() as u64 > MAX_BYTES {
            return Err(damaged(format!("it has {} bytes; no state has more than {MAX_BYTES}", file.len())));
        }
        if file.len() < HEADER + TRAILER || !file.starts_with(MAGIC) {
            return Err(damaged("it is no state file"));
        }
        let u32_at = |bytes: &[u8], at: usize| u32::from_le_bytes(bytes[at..at + 4].try_into().expect("four bytes"));
        let u16_at = |bytes: &[u8], at: usize| u16::from_le_bytes(bytes[at..at + 2].try_into().expect("two bytes"));
        // Before the checksum, whose place another form may have changed.
        let form = u32_at(file, 8);
        if form != VERSION {
            return Err(FormatError::OtherForm { found: form });
        }
        let (body, trailer) = file.split_at(file.len() - TRAILER);
        if seal(body) != trailer {
            return Err(damaged("its checksum is wrong"));
        }
        let count = u32_at(file, 12);
        if count > MAX_SECTIONS {
            return Err(damaged(format!("it claims {count} sections")));
        }
        let mut rest = &body[HEADER..];
        let mut sections = Vec::with_capacity(count as usize);
        for _ in 0..count {
            let (header, after) = rest.split_at_checked(SECTION_HEADER).ok_or_else(|| damaged("a section is cut short"))?;
            let length = u32_at(header, 8) as usize;
            let (content, after) = after.split_at_checked(length).ok_or_else(|| damaged("a section is cut short"))?;
            let section = Section { tag: u32_at(header, 0), version: u16_at(header, 4), optional: u16_at(header, 6) & OPTIONAL != 0, content };
            if crc32fast::hash(content) != u32_at(header, 12) {
                return Err(damaged(format!("the checksum of its section {} is wrong", name(section.tag))));
            }
            sections.push(section);
            rest = after;
        }
        if !rest.is_empty() {
            return Err(damaged(format!("{} bytes of it belong to no section", rest.len())));
        }
        Ok(Self { sections })
    }

    /// All sections, in order.
    pub fn iter(&self) -> impl Iterator<Item = &Section<'a>> {
        self.sections.iter()
    }

    /// The only section with this tag.
    pub fn only(&self, tag: u32) -> Result<&Section<'a>, FormatError> {
        let mut found = self.sections.iter().filter(|section| section.tag == tag);
        match (found.next(), found.next()) {
            (Some(section), None) => Ok(section),
            (None, _) => Err(FormatError::Missing { name: name(tag) }),
            (Some(_), Some(_)) => Err(damaged(format!("it has its section {} twice", name(tag)))),
        }
    }

    /// Refuses the file if it has a section that is in none of `known` and may not be left out.
    pub fn check_known(&self, known: &[u32]) -> Result<(), FormatError> {
        match self.sections.iter().find(|section| !section.optional && !known.contains(&section.tag)) {
            Some(section) => Err(section.not_understood()),
            None => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn file(sections: &[(u32, u16, Vec<u8>)]) -> Vec<u8> {
        let mut writer = Writer::default();
        for (tag, version, content) in sections {
            writer.section(*tag, *version, content);
        }
        writer.finish()
    }

    /// A file whose checksum is right whatever its body says.
    fn sealed(mut body: Vec<u8>) -> Vec<u8> {
        body.extend(seal(&body));
        body
    }

    /// A manifest tells files apart by the CRC-32 of the whole.
    #[test]
    fn files_that_differ_have_checksums_that_differ() {
        let sums: std::collections::HashSet<u32> = (0..100u8).map(|byte| crc32fast::hash(&file(&[(1, 1, vec![byte; 50])]))).collect();
        assert_eq!(sums.len(), 100);
    }

    #[test]
    fn what_is_not_understood_is_refused_unless_it_is_optional() {
        let mut writer = Writer::default();
        writer.section(1, 1, b"a");
        writer.optional_section(2, 9, b"b");
        let bytes = writer.finish();
        let sections = Sections::parse(&bytes).unwrap();
        sections.check_known(&[1]).unwrap();
        let error = sections.check_known(&[2]).unwrap_err();
        assert!(matches!(error, FormatError::NotUnderstood { version: 1, .. }), "{error}");
        assert!(matches!(sections.only(3), Err(FormatError::Missing { .. })));
        let bytes = file(&[(1, 1, vec![]), (1, 1, vec![])]);
        assert!(matches!(Sections::parse(&bytes).unwrap().only(1), Err(FormatError::Damaged(_))));
    }

    #[test]
    fn another_form_is_told_from_damage() {
        let mut bytes = file(&[]);
        let other = VERSION + 1;
        bytes[8..12].copy_from_slice(&other.to_le_bytes());
        assert!(matches!(Sections::parse(&bytes), Err(FormatError::OtherForm { found }) if found == other));
    }

    proptest! {
        #[test]
        fn what_was_written_is_read(sections in proptest::collection::vec((any::<u32>(), any::<u16>(), proptest::collection::vec(any::<u8>(), 0..300)), 0..20)) {
            let bytes = file(&sections);
            let read: Vec<_> = Sections::parse(&bytes).unwrap().iter().map(|section| (section.tag, section.version, section.content.to_vec())).collect();
            prop_assert_eq!(read, sections);
        }

        #[test]
        fn every_flipped_bit_and_every_other_length_is_noticed(content in proptest::collection::vec(any::<u8>(), 0..300), at in any::<prop::sample::Index>(), bit in 0..8) {
            let good = file(&[(1, 1, content)]);
            let mut bytes = good.clone();
            let at = at.index(bytes.len());
            bytes[at] ^= 1u8 << bit;
            prop_assert!(Sections::parse(&bytes).is_err());
            prop_assert!(Sections::parse(&good[..at]).is_err());
        }

        #[test]
        fn forged_lengths_with_right_checksums_never_panic(count in any::<u32>(), words in proptest::collection::vec(prop_oneof![0u32..64, any::<u32>()], 0..40)) {
            let mut body = MAGIC.to_vec();
            body.extend(VERSION.to_le_bytes());
            body.extend(prop_oneof_count(count).to_le_bytes());
            for word in words {
                body.extend(word.to_le_bytes());
            }
            let _ = Sections::parse(&sealed(body));
        }

        #[test]
        fn any_bytes_are_refused_without_a_panic(bytes in proptest::collection::vec(any::<u8>(), 0..400)) {
            prop_assert!(Sections::parse(&bytes).is_err());
        }
    }

    fn prop_oneof_count(count: u32) -> u32 {
        if count.is_multiple_of(2) { count % 5 } else { count }
    }
}
