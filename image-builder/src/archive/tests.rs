use std::{
    io::{Cursor, Write as _},
    os::unix::fs::PermissionsExt,
    path::Path,
};

use proptest::prelude::*;
use zip::{CompressionMethod, ZipWriter, write::SimpleFileOptions};

use rustix::fs::renameat_with;

use super::*;

enum Entry<'a> {
    File(&'a str, &'a [u8]),
    Mode(&'a str, u32),
    Directory(&'a str),
    Link(&'a str, &'a str),
}
use Entry::{Directory, File, Link, Mode};

fn zip(entries: &[Entry<'_>]) -> Vec<u8> {
    let mut writer = ZipWriter::new(Cursor::new(Vec::new()));
    let plain = SimpleFileOptions::default().compression_method(CompressionMethod::Deflated);
    for entry in entries {
        match entry {
            File(name, bytes) => {
                writer.start_file(*name, plain).unwrap();
                writer.write_all(bytes).unwrap();
            }
            Mode(name, mode) => {
                writer.start_file(*name, plain.unix_permissions(*mode)).unwrap();
                writer.write_all(b"x").unwrap();
            }
            Directory(name) => writer.add_directory(*name, plain).unwrap(),
            Link(name, target) => writer.add_symlink(*name, *target, plain).unwrap(),
        }
    }
    writer.finish().unwrap().into_inner()
}

/// Unpacks, and makes sure that nothing but the context was touched.
fn unpacked(bytes: &[u8], limits: Limits) -> (tempfile::TempDir, Result<(), ArchiveError>) {
    let dir = tempfile::tempdir().unwrap();
    let (path, context) = (dir.path().join("a.zip"), dir.path().join("outer/context"));
    std::fs::write(&path, bytes).unwrap();
    std::fs::create_dir_all(&context).unwrap();
    let done = unpack(&Artifact::Zip(path), &context, limits, &CancellationToken::new());
    let outside: Vec<_> = std::fs::read_dir(dir.path()).unwrap().chain(std::fs::read_dir(dir.path().join("outer")).unwrap()).collect();
    assert_eq!(outside.len(), 3, "something was written outside of the context");
    (dir, done)
}

fn refusal(bytes: &[u8]) -> String {
    unpacked(bytes, Limits::DEFAULT).1.expect_err("it must be refused").to_string()
}

const DOCKERFILE: Entry<'static> = File("Dockerfile", b"FROM scratch\n");

/// A zip whose first entry is renamed byte by byte to something that writers refuse to write.
fn renamed(to: &[u8]) -> Vec<u8> {
    let placeholder = "N".repeat(to.len());
    let mut bytes = zip(&[File(&placeholder, b"evil"), DOCKERFILE]);
    let found: Vec<usize> = (0..bytes.len()).filter(|at| bytes[*at..].starts_with(placeholder.as_bytes())).collect();
    assert_eq!(found.len(), 2, "once in the local header, once in the directory");
    for at in found {
        bytes[at..at + to.len()].copy_from_slice(to);
    }
    bytes
}

#[test]
fn an_ordinary_archive_is_unpacked_with_its_modes_and_links() {
    let bytes = zip(&[
        Directory("app/"),
        File("app/app.py", b"print()"),
        Mode("run.sh", 0o4755),
        Link("app/link", "../run.sh"),
        Link("current", "app"),
        File("deep/er/file", b""),
        DOCKERFILE,
    ]);
    let (dir, done) = unpacked(&bytes, Limits::DEFAULT);
    done.unwrap();
    let context = dir.path().join("outer/context");
    assert_eq!(std::fs::read(context.join("app/app.py")).unwrap(), b"print()");
    assert_eq!(std::fs::read(context.join("current/link")).unwrap(), b"x");
    let mode = std::fs::metadata(context.join("run.sh")).unwrap().permissions().mode();
    assert_eq!(mode & 0o7777, 0o755, "the set-user-id bit is dropped");
    assert!(context.join("deep/er/file").is_file());
}

#[test]
fn hostile_names_are_refused_with_their_reason() {
    for (name, reason) in [
        (&b"../evil"[..], "`..`"),
        (b"a/../../evil", "`..`"),
        (b"a/..", "`..`"),
        (b"/etc/evil", "absolute"),
        (b"//evil", "absolute"),
        (b"..\\evil", "backslash"),
        (b"C:\\evil", "backslash"),
        (b"a\0b", "NUL"),
        (b"a\nb", "control"),
        (b"a\x1b[2Jb", "control"),
        (b"\xff\xfe.py", "UTF-8"),
        (&[b'x'; 256], "255"),
    ] {
        let message = refusal(&renamed(name));
        assert!(message.contains(reason), "{}: {message}", shown(name));
    }
}

#[test]
fn links_stay_inside() {
    for (name, target, reason) in [
        ("l", "/etc/passwd", "absolute"),
        ("l", "..", "outside"),
        ("l", "../x", "outside"),
        ("a/l", "../../x", "outside"),
        ("l", "./../x", "outside"),
        ("l", "a/../../x", "behind a name"),
        ("l", "", "empty"),
        ("l", "a\0b", "NUL"),
    ] {
        let message = refusal(&zip(&[Link(name, target), DOCKERFILE]));
        assert!(message.contains(reason), "{name} -> {target}: {message}");
    }
    for (name, target) in [("l", "x"), ("a/l", ".."), ("a/b/l", "../../x"), ("l", "not/there"), ("l", "l")] {
        unpacked(&zip(&[Link(name, target), DOCKERFILE]), Limits::DEFAULT).1.unwrap();
    }
}

#[test]
fn nothing_is_written_through_a_link_of_the_archive() {
    // The classic: a link to a directory, then a file "in" it.
    let message = refusal(&zip(&[Link("d", "app"), File("d/evil", b""), DOCKERFILE]));
    assert!(message.contains("twice"), "{message}");
    let message = refusal(&zip(&[File("d/evil", b""), Link("d", "app"), DOCKERFILE]));
    assert!(message.contains("twice"), "{message}");
}

#[test]
fn the_same_path_twice_is_refused() {
    for entries in [[File("a", b"1"), File("./a", b"2")], [File("a", b"1"), Directory("a/")], [File("a", b""), File("a/b", b"")]] {
        let message = refusal(&zip(&entries));
        assert!(message.contains("twice"), "{message}");
    }
}

#[test]
fn special_files_and_encrypted_files_are_refused() {
    let mut bytes = zip(&[Mode("Dockerfile", 0o644)]);
    // The upper half of "external attributes" in the directory record is the unix mode; make it a FIFO.
    let record = (0..bytes.len()).find(|at| bytes[*at..].starts_with(b"PK\x01\x02")).unwrap();
    bytes[record + 40..record + 42].copy_from_slice(&0o010_644_u16.to_le_bytes());
    assert!(refusal(&bytes).contains("neither a file"));

    let mut bytes = zip(&[DOCKERFILE]);
    let record = (0..bytes.len()).find(|at| bytes[*at..].starts_with(b"PK\x01\x02")).unwrap();
    bytes[record + 8] |= 1;
    bytes[6] |= 1;
    assert!(refusal(&bytes).contains("encrypted"), "{}", refusal(&bytes));
}

#[test]
fn bombs_are_refused_while_they_unpack() {
    let zeros = vec![0; 1 << 20];
    let limits = Limits { ratio_from: 100_000, ..Limits::DEFAULT };
    let bytes = zip(&[File("zeros", &zeros), DOCKERFILE]);
    let message = unpacked(&bytes, limits).1.unwrap_err().to_string();
    assert!(message.contains("200 times"), "{message}");

    let limits = Limits { bytes: 1 << 20, ..Limits::DEFAULT };
    let message = unpacked(&zip(&[File("a", &zeros), File("b", b"1"), DOCKERFILE]), limits).1.unwrap_err().to_string();
    assert!(message.contains("1 MiB"), "{message}");

    let limits = Limits { entries: 3, ..Limits::DEFAULT };
    for entries in [&[File("a", b""), File("b", b""), File("c", b""), DOCKERFILE][..], &[File("a/b/c/d", b""), DOCKERFILE]] {
        let message = unpacked(&zip(entries), limits).1.unwrap_err().to_string();
        assert!(message.contains("3 entries"), "directories count, named or not: {message}");
    }
    let limits = Limits { zip_bytes: 10, ..Limits::DEFAULT };
    assert!(matches!(unpacked(&zip(&[DOCKERFILE]), limits).1, Err(ArchiveError::TooLarge { .. })));
}

#[test]
fn a_header_that_lies_about_sizes_gains_nothing() {
    let zeros = vec![0; 1 << 20];
    let mut bytes = zip(&[File("zeros", &zeros), DOCKERFILE]);
    let record = (0..bytes.len()).find(|at| bytes[*at..].starts_with(b"PK\x01\x02")).unwrap();
    // Uncompressed size: one byte.
    bytes[record + 24..record + 28].copy_from_slice(&1_u32.to_le_bytes());
    bytes[22..26].copy_from_slice(&1_u32.to_le_bytes());
    let (dir, done) = unpacked(&bytes, Limits { bytes: 1000, ..Limits::DEFAULT });
    assert!(done.is_err());
    let written = std::fs::metadata(dir.path().join("outer/context/zeros")).map_or(0, |metadata| metadata.len());
    assert!(written <= 64 << 10, "{written} bytes were written");
}

#[test]
fn an_end_record_that_promises_too_much_is_refused_before_it_is_believed() {
    let mut bytes = zip(&[DOCKERFILE]);
    let end = bytes.len() - 22;
    bytes[end + 8..end + 12].copy_from_slice(&[0x20, 0x4e, 0x20, 0x4e]); // 20,000 entries
    assert!(refusal(&bytes).contains("10000 entries"));
    bytes[end + 8..end + 12].copy_from_slice(&[0xff; 4]);
    assert!(refusal(&bytes).contains("10000 entries"), "0xffff without a zip64 record");
}

#[test]
fn what_is_not_a_zip_is_called_so() {
    let good = zip(&[DOCKERFILE, File("app.py", b"print('hello')")]);
    for bytes in [&b""[..], b"hello", b"PK\x03\x04", &good[..good.len() - 25], &[0; 4096]] {
        let message = refusal(bytes);
        assert!(message.contains("not a zip file"), "{message}");
    }
    // A flipped byte in the compressed data.
    let mut damaged = good.clone();
    damaged[45] ^= 0xff;
    assert!(refusal(&damaged).contains("\"Dockerfile\" cannot be unpacked"), "{}", refusal(&damaged));
}

#[test]
fn a_missing_dockerfile_comes_with_the_usual_reason() {
    assert!(refusal(&zip(&[])).ends_with("it is empty"));
    assert!(refusal(&zip(&[File("app.py", b"")])).ends_with("no Dockerfile at the root of the archive"));
    assert!(refusal(&zip(&[File("project/Dockerfile", b"")])).contains("pack what is in \"project\""));
    assert!(refusal(&zip(&[File("dockerfile", b"")])).contains("must be spelled `Dockerfile`"));
    assert!(refusal(&zip(&[Link("Dockerfile", "other"), File("other", b"")])).contains("not a regular file"));
    assert!(refusal(&zip(&[Directory("Dockerfile/")])).contains("not a regular file"));
}

#[test]
fn a_directory_is_held_to_the_same_rules() {
    let dir = tempfile::tempdir().unwrap();
    let from = dir.path().join("from");
    let copy = |to: &str| {
        let to = dir.path().join(to);
        std::fs::create_dir(&to).unwrap();
        unpack(&Artifact::Directory(from.clone()), &to, Limits::DEFAULT, &CancellationToken::new())
    };
    assert!(matches!(copy("0"), Err(ArchiveError::Read { .. })), "there is no such directory");
    std::fs::create_dir_all(from.join("sub")).unwrap();
    assert!(matches!(copy("1"), Err(ArchiveError::NoDockerfile { .. })));
    std::fs::write(from.join("Dockerfile"), "FROM scratch").unwrap();
    symlink("../Dockerfile", from.join("sub/link")).unwrap();
    copy("2").unwrap();
    assert_eq!(std::fs::read_to_string(dir.path().join("2/sub/link")).unwrap(), "FROM scratch");
    symlink("/etc/passwd", from.join("escape")).unwrap();
    assert!(matches!(copy("3"), Err(ArchiveError::Link { .. })));
    std::fs::remove_file(from.join("escape")).unwrap();
    let _socket = std::os::unix::net::UnixListener::bind(from.join("socket")).unwrap();
    assert!(matches!(copy("4"), Err(ArchiveError::Special { .. })));
}

#[test]
fn what_has_become_a_link_since_it_was_checked_is_not_followed() {
    let dir = tempfile::tempdir().unwrap();
    let (real, secret) = (dir.path().canonicalize().unwrap(), dir.path().canonicalize().unwrap().join("secret"));
    std::fs::create_dir_all(secret.join("code")).unwrap();
    std::fs::write(secret.join("code/Dockerfile"), "FROM scratch").unwrap();
    std::fs::write(secret.join("code/app.zip"), zip(&[DOCKERFILE])).unwrap();
    symlink(&secret, real.join("parent")).unwrap();
    symlink(secret.join("code"), real.join("code")).unwrap();
    symlink(secret.join("code/app.zip"), real.join("app.zip")).unwrap();
    let tries = [
        Artifact::Directory(real.join("code")),
        Artifact::Directory(real.join("parent/code")),
        Artifact::Zip(real.join("app.zip")),
        Artifact::Zip(real.join("parent/code/app.zip")),
    ];
    for artifact in tries {
        let context = real.join("context");
        std::fs::create_dir(&context).unwrap();
        let refused = unpack(&artifact, &context, Limits::DEFAULT, &CancellationToken::new()).unwrap_err().to_string();
        assert!(refused.contains("exchanged for a symbolic link"), "{artifact:?}: {refused}");
        assert_eq!(std::fs::read_dir(&context).unwrap().count(), 0);
        std::fs::remove_dir(&context).unwrap();
    }
}

/// A thread exchanges a directory and a link to a secret all the while; whatever is copied was never behind the link.
#[test]
fn a_directory_that_turns_into_a_link_while_it_is_copied_gives_nothing_away() {
    use std::sync::atomic::{AtomicBool, Ordering};
    let dir = tempfile::tempdir().unwrap();
    let root = dir.path().canonicalize().unwrap();
    let (from, secret) = (root.join("from"), root.join("secret"));
    for (place, word) in [(&from.join("sub"), "mine"), (&secret, "secret")] {
        std::fs::create_dir_all(place).unwrap();
        (0..20).for_each(|n| std::fs::write(place.join(format!("f{n}")), word).unwrap());
    }
    std::fs::write(from.join("Dockerfile"), "FROM scratch").unwrap();
    symlink(&secret, root.join("link")).unwrap();
    let stop = AtomicBool::new(false);
    /// Also if a check fails.
    struct Stops<'a>(&'a AtomicBool);
    impl Drop for Stops<'_> {
        fn drop(&mut self) {
            self.0.store(true, Ordering::Relaxed);
        }
    }
    std::thread::scope(|scope| {
        let _stops = Stops(&stop);
        scope.spawn(|| {
            let exchange = || renameat_with(CWD, from.join("sub"), CWD, root.join("link"), rustix::fs::RenameFlags::EXCHANGE);
            while !stop.load(Ordering::Relaxed) {
                exchange().unwrap();
            }
        });
        for n in 0..300 {
            let context = root.join(format!("context-{n}"));
            std::fs::create_dir(&context).unwrap();
            // Mostly refused: the link leads outside, and what was a directory may be none.
            let _ = unpack(&Artifact::Directory(from.clone()), &context, Limits::DEFAULT, &CancellationToken::new());
            for file in std::fs::read_dir(context.join("sub")).into_iter().flatten().flatten() {
                assert_eq!(std::fs::read_to_string(file.path()).unwrap(), "mine");
            }
            std::fs::remove_dir_all(&context).unwrap();
        }
    });
}

#[test]
fn a_cancelled_unpack_stops() {
    let (dir, cancel) = (tempfile::tempdir().unwrap(), CancellationToken::new());
    let path = dir.path().join("a.zip");
    std::fs::write(&path, zip(&[DOCKERFILE])).unwrap();
    cancel.cancel();
    let context = dir.path().join("context");
    std::fs::create_dir(&context).unwrap();
    assert!(matches!(unpack(&Artifact::Zip(path), &context, Limits::DEFAULT, &cancel), Err(ArchiveError::Cancelled)));
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(256))]

    /// Whatever passes is a plain path below the root.
    #[test]
    fn an_accepted_name_stays_below_the_root(raw in prop::collection::vec(prop_oneof![Just(b'/'), Just(b'.'), Just(b'\\'), any::<u8>(), Just(b'a')], 0..40)) {
        if let Ok(Some(name)) = EntryName::parse(&raw) {
            let path = Path::new(&name.0);
            prop_assert!(path.components().all(|part| matches!(part, std::path::Component::Normal(_))));
            prop_assert_eq!(path.components().count(), name.depth() + 1);
        }
    }

    /// Links among accepted names and targets never lead out of the tree, in whatever order they refer to each other.
    #[test]
    fn accepted_links_never_lead_outside(
        links in prop::collection::vec(("[abc](/[abc]){0,2}", prop::collection::vec(prop_oneof!["a", "b", "c", Just("..".to_owned()), Just(".".to_owned())], 1..5)), 1..8)
    ) {
        let dir = tempfile::tempdir().unwrap();
        let root = dir.path().join("root");
        std::fs::create_dir(&root).unwrap();
        let mut tree = Tree::new(root.clone(), Limits::DEFAULT, CancellationToken::new());
        for (name, target) in &links {
            let name = EntryName::parse(name.as_bytes()).unwrap().unwrap();
            // Refused ones are simply not there.
            let _ = tree.link(name, target.join("/").as_bytes());
        }
        let names: Vec<String> = tree.kinds.keys().cloned().collect();
        let _ = tree.finish();
        let root = root.canonicalize().unwrap();
        for name in names {
            if let Ok(real) = root.join(name).canonicalize() {
                prop_assert!(real.starts_with(&root), "{real:?}");
            }
        }
    }

    /// Damage anywhere is refused or harmless, never a panic or a write outside.
    #[test]
    fn damaged_zips_do_no_harm(flips in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..6)) {
        let mut bytes = zip(&[Directory("app/"), File("app/app.py", b"print()"), Link("l", "app"), DOCKERFILE]);
        for (at, value) in flips {
            let at = at.index(bytes.len());
            bytes[at] = value;
        }
        let _ = unpacked(&bytes, Limits::DEFAULT);
    }
}
