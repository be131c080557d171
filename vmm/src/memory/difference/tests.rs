use std::collections::BTreeMap;

use proptest::prelude::*;
use vm_memory::GuestAddress;
use vmm_protocol::{control::MemoryUse, pagemap::Way};

use super::*;

/// One piece has to do here; two are tested below.
const BYTES: u64 = 2 << 20;
const PAGES: u64 = BYTES / PAGE;

fn file(content: &[u8], bytes: u64) -> File {
    let mut file = tempfile::tempfile().unwrap();
    file.write_all(content).unwrap();
    file.set_len(bytes).unwrap();
    file
}

/// An image in which every second page is zero and each other one is full of its number.
fn image() -> File {
    let content: Vec<u8> = (0..PAGES).flat_map(|page| vec![if page % 2 == 0 { 0 } else { page as u8 | 1 }; PAGE as usize]).collect();
    file(&content, BYTES)
}

fn clone_of(image: &File) -> GuestRam {
    GuestRam::map(image.try_clone().unwrap(), BYTES, MemoryUse::Private).unwrap()
}

fn pagemap() -> File {
    File::open("/proc/self/pagemap").unwrap()
}

fn page_tables(way: Way) -> DirtyPages {
    DirtyPages::PageTables { way, pagemap: pagemap() }
}

/// All ways that this kernel has; Linux before 6.7 has no scan.
fn ways(image: &File) -> Vec<DirtyPages> {
    let scans = vmm_protocol::pagemap::private_pages_by(Way::Scan, &pagemap(), &(0..PAGE)).is_ok();
    let found = clone_of(image).find_way(Some(pagemap()));
    let best = if scans { Way::Scan } else { Way::Read };
    assert!(matches!(&found, DirtyPages::PageTables { way, .. } if *way == best), "{found:?}");
    [found, page_tables(Way::Read), DirtyPages::CompareAll].into()
}

fn content(memory: &GuestRam) -> Vec<u8> {
    let mut bytes = vec![0; BYTES as usize];
    read_guest(memory, 0, &mut bytes).unwrap();
    bytes
}

fn save(memory: &GuestRam, image: &File) -> (File, Written) {
    save_by(&page_tables(Way::Read), memory, image)
}

fn save_by(dirty: &DirtyPages, memory: &GuestRam, image: &File) -> (File, Written) {
    let out = tempfile::tempfile().unwrap();
    let written = write(memory, dirty, image, &out, &mut || false).unwrap();
    (out, written)
}

fn whole(file: &File) -> Vec<u8> {
    let mut bytes = vec![0; file.metadata().unwrap().len() as usize];
    file.read_exact_at(&mut bytes, 0).unwrap();
    bytes
}

/// Two tests that use half of a process's mappings each are not run at the same time.
static MAPPINGS: std::sync::Mutex<()> = std::sync::Mutex::new(());

/// What a guest or the balloon does to pages.
#[derive(Debug, Clone)]
enum Step {
    Fill { first: u64, pages: u64, value: u8 },
    Discard { first: u64, pages: u64 },
    /// Writes what is there already: the page belongs to the process, and is equal.
    Touch { page: u64 },
    Sleep,
}

fn step() -> impl Strategy<Value = Step> {
    let range = (0..PAGES, 1u64..40).prop_map(|(first, pages)| (first, pages.min(PAGES - first)));
    prop_oneof![
        4 => (range.clone(), 0u8..4).prop_map(|((first, pages), value)| Step::Fill { first, pages, value }),
        2 => range.prop_map(|(first, pages)| Step::Discard { first, pages }),
        1 => (0..PAGES).prop_map(|page| Step::Touch { page }),
        2 => Just(Step::Sleep),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    #[test]
    fn a_guest_finds_its_memory_after_every_sleep(steps in proptest::collection::vec(step(), 1..30)) {
        let image = image();
        let mut memory = clone_of(&image);
        let mut expected = content(&memory);
        for step in steps {
            match step {
                Step::Fill { first, pages, value } => {
                    let range = (first * PAGE) as usize..((first + pages) * PAGE) as usize;
                    expected[range.clone()].fill(value);
                    write_guest(&memory, first * PAGE, &expected[range]).unwrap();
                }
                Step::Discard { first, pages } => {
                    expected[(first * PAGE) as usize..((first + pages) * PAGE) as usize].fill(0);
                    memory.discard(first * PAGE, pages * PAGE).unwrap();
                }
                Step::Touch { page } => write_guest(&memory, page * PAGE, &expected[(page * PAGE) as usize..((page + 1) * PAGE) as usize]).unwrap(),
                Step::Sleep => {
                    let (difference, _) = save(&memory, &image);
                    memory = clone_of(&image);
                    lay_over(&memory, &difference).unwrap();
                }
            }
            prop_assert!(content(&memory) == expected);
        }
        // Whichever way the written pages are found, the file is the same.
        let (difference, _) = save(&memory, &image);
        for way in ways(&image) {
            prop_assert!(whole(&save_by(&way, &memory, &image).0) == whole(&difference), "{:?}", way);
        }
        // And the difference says exactly which pages are not the image's.
        let mut theirs = vec![0; BYTES as usize];
        image.read_exact_at(&mut theirs, 0).unwrap();
        let unequal: Vec<u64> = (0..PAGES).filter(|page| {
            let range = (page * PAGE) as usize..((page + 1) * PAGE) as usize;
            expected[range.clone()] != theirs[range]
        }).collect();
        let mut source = &difference;
        let reader = Reader::open(&mut source, PAGES).unwrap();
        let written: Vec<u64> = reader.runs().iter().flat_map(|run| u64::from(run.first)..u64::from(run.first) + u64::from(run.pages)).collect();
        prop_assert_eq!(written, unequal);
    }
}

#[test]
fn clones_do_not_see_each_other_and_the_image_stays() {
    let image = image();
    let (one, other) = (clone_of(&image), clone_of(&image));
    write_guest(&one, 5 * PAGE, &[0xaa; 4096]).unwrap();
    let mut seen = vec![0; 4096];
    read_guest(&other, 5 * PAGE, &mut seen).unwrap();
    assert!(seen.iter().all(|byte| *byte == 5));
    image.read_exact_at(&mut seen, 5 * PAGE).unwrap();
    assert!(seen.iter().all(|byte| *byte == 5));
}

#[test]
fn pages_that_still_come_from_the_file_before_are_carried_over() {
    let image = image();
    let memory = clone_of(&image);
    write_guest(&memory, 0, &vec![9; 300 * PAGE as usize]).unwrap();
    let (first, written) = save(&memory, &image);
    assert_eq!(written.data_pages, 298, "pages 9 and 265 of the image are full of nines already");
    let again = clone_of(&image);
    lay_over(&again, &first).unwrap();
    write_guest(&again, 400 * PAGE, &[7; 4096]).unwrap();
    let (second, written) = save(&again, &image);
    assert_eq!(written.data_pages, 299);
    let last = clone_of(&image);
    lay_over(&last, &second).unwrap();
    assert!(content(&last) == content(&again));
}

/// Every second page of a long run that is mapped from the difference: each discard cuts a mapping in three.
#[test]
fn a_guest_cannot_cut_its_memory_into_more_mappings_than_a_process_may_have() {
    let _alone = MAPPINGS.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
    const BYTES: u64 = 320 << 20;
    let image = file(&[], BYTES);
    let map = || GuestRam::map(image.try_clone().unwrap(), BYTES, MemoryUse::Private).unwrap();
    let memory = map();
    for at in (0..BYTES).step_by(1 << 20) {
        write_guest(&memory, at, &[7; 1 << 20]).unwrap();
    }
    let (difference, _) = save(&memory, &image);
    drop(memory);
    let memory = map();
    lay_over(&memory, &difference).unwrap();
    let refused = (0..BYTES / PAGE / 2).find_map(|page| memory.discard(page * 2 * PAGE, PAGE).err());
    assert!(refused.is_some_and(|error| error.to_string().contains("too many pieces")));
    let mappings = std::fs::read_to_string("/proc/self/maps").unwrap().lines().count();
    assert!(mappings < 40_000, "{mappings}");
}

#[test]
fn a_damaged_difference_is_noticed_wherever_the_damage_is() {
    let image = image();
    let memory = clone_of(&image);
    // One long run, which is mapped, and short ones, which are copied.
    write_guest(&memory, 0, &vec![3; 100 * PAGE as usize]).unwrap();
    write_guest(&memory, 200 * PAGE, &[3; 4096]).unwrap();
    let (good, written) = save(&memory, &image);
    for at in [0, PAGE, 50 * PAGE + 17, written.bytes - 1] {
        let mut bytes = vec![0; written.bytes as usize];
        good.read_exact_at(&mut bytes, 0).unwrap();
        bytes[at as usize] ^= 1;
        let error = lay_over(&clone_of(&image), &file(&bytes, written.bytes)).unwrap_err();
        assert!(matches!(error, DiffError::Damaged(_)), "{at}: {error}");
    }
}

#[test]
fn a_cancelled_save_says_so_and_the_guest_has_its_memory_still() {
    let image = image();
    let memory = clone_of(&image);
    write_guest(&memory, 0, &vec![3; 500 * PAGE as usize]).unwrap();
    let before = content(&memory);
    let mut asked = 0;
    let out = tempfile::tempfile().unwrap();
    let error = write(&memory, &page_tables(Way::Read), &image, &out, &mut || {
        asked += 1;
        asked > 2
    })
    .unwrap_err();
    assert!(matches!(error, WriteError::Cancelled));
    assert!(content(&memory) == before);
}

#[test]
fn memory_above_the_hole_is_found() {
    // Sparse, so nothing is used but page tables.
    let bytes = crate::arch::layout::HOLE + (64 << 20);
    let image = file(&[], bytes);
    let memory = GuestRam::map(image.try_clone().unwrap(), bytes, MemoryUse::Private).unwrap();
    let address = crate::arch::layout::ABOVE_HOLE + (5 << 20);
    memory.memory().write_slice(&[1; 8192], GuestAddress(address)).unwrap();
    // Over the border: the last page below the hole and the first above are neighbours in the file.
    write_guest(&memory, crate::arch::layout::HOLE - PAGE, &[2; 8192]).unwrap();
    let (difference, written) = save(&memory, &image);
    assert_eq!(written.data_pages, 4);
    let again = GuestRam::map(image, bytes, MemoryUse::Private).unwrap();
    lay_over(&again, &difference).unwrap();
    let mut seen = BTreeMap::new();
    for at in [address, address + PAGE, crate::arch::layout::HOLE - PAGE, crate::arch::layout::ABOVE_HOLE] {
        seen.insert(at, again.memory().read_obj::<u8>(GuestAddress(at)).unwrap());
    }
    assert_eq!(seen.into_values().collect::<Vec<_>>(), [2, 2, 1, 1]);
}

#[test]
fn a_file_of_another_length_is_refused() {
    let error = GuestRam::map(file(&[], BYTES - PAGE), BYTES, MemoryUse::Private).unwrap_err();
    assert!(error.to_string().contains("should have"), "{error}");
}

#[test]
fn what_a_booting_guest_discards_is_a_hole_in_its_file() {
    let image = image();
    let memory = GuestRam::map(image.try_clone().unwrap(), BYTES, MemoryUse::Shared).unwrap();
    memory.discard(PAGE, 3 * PAGE).unwrap();
    memory.discard(5 * PAGE + 1, PAGE).unwrap();
    let mut seen = vec![0; 6 * PAGE as usize];
    image.read_exact_at(&mut seen, 0).unwrap();
    assert!(seen[..4096 * 5].iter().all(|byte| *byte == 0) && seen[4096 * 5..].iter().all(|byte| *byte == 5));
}

#[test]
fn a_guest_that_gives_back_every_second_page_cannot_use_up_the_mappings() {
    let _alone = MAPPINGS.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
    let bytes = 512 << 20;
    let image = file(&[], bytes);
    let memory = GuestRam::map(image, bytes, MemoryUse::Private).unwrap();
    let refused = (0..bytes / PAGE / 2).map(|page| memory.discard(2 * page * PAGE, PAGE)).filter(Result::is_err).count() as u64;
    assert_eq!(refused, bytes / PAGE / 2 - 16 * 1024);
    // What is between two pieces joins them.
    let before = memory.overlaid.lock().unwrap().edges;
    memory.map_over(PAGE, PAGE, None).unwrap();
    assert_eq!(memory.overlaid.lock().unwrap().edges, before - 2);
    let maps = std::fs::read_to_string("/proc/self/maps").unwrap().lines().count();
    assert!(maps < 40_000, "{maps}");
}

#[test]
fn a_way_that_overlooks_a_written_page_is_not_used() {
    let image = image();
    let memory = clone_of(&image);
    // As long as a pagemap is for any address of a process, and without a word about any page.
    let silent = file(&[], 1 << 38);
    for pagemap in [None, Some(silent), Some(file(&[], 8))] {
        let way = memory.find_way(pagemap);
        assert!(matches!(way, DirtyPages::CompareAll), "{way:?}");
    }
    write_guest(&memory, 3 * PAGE, &[9; 4096]).unwrap();
    let (_, written) = save_by(&DirtyPages::CompareAll, &memory, &image);
    assert_eq!(written.data_pages, 1);
}
