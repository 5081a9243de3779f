//! Images that the tests make themselves, and those that qemu-img makes where it is installed.

use super::*;
use flate2::Compression;
use flate2::write::DeflateEncoder;
use proptest::prelude::*;
use std::io::Write;
use std::path::PathBuf;
use std::process::Command;
use std::sync::atomic::{AtomicU32, Ordering};

/// A file that goes away with it.
struct Temporary(PathBuf);

impl Temporary {
    fn name(end: &str) -> Temporary {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let n = NEXT.fetch_add(1, Ordering::Relaxed);
        Temporary(std::env::temp_dir().join(format!("bivisor-disk-{}-{n}{end}", std::process::id())))
    }
    fn with(bytes: &[u8]) -> Temporary {
        let t = Temporary::name("");
        std::fs::write(&t.0, bytes).expect("a temporary file");
        t
    }
}

impl Drop for Temporary {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.0);
    }
}

const CLUSTER: usize = 512;

/// A version-3 image of 16 clusters of 512 bytes: cluster 1 plain, 2 compressed, 3 zeros, the others not there (but for `backing`). Its
/// reference counts are at 5 and 6.
fn image(backing: Option<(&str, &str)>) -> Vec<u8> {
    let mut b = vec![0; CLUSTER * 8];
    let mut put = |at: usize, v: &[u8]| b[at..at + v.len()].copy_from_slice(v);
    put(0, &MAGIC);
    put(4, &3u32.to_be_bytes());
    put(20, &9u32.to_be_bytes());
    put(24, &(16 * CLUSTER as u64).to_be_bytes());
    put(36, &1u32.to_be_bytes());
    put(40, &(CLUSTER as u64).to_be_bytes());
    put(48, &(5 * CLUSTER as u64).to_be_bytes());
    put(56, &1u32.to_be_bytes());
    put(5 * CLUSTER, &(6 * CLUSTER as u64).to_be_bytes());
    put(6 * CLUSTER, &[0, 1].repeat(7));
    put(96, &4u32.to_be_bytes());
    put(100, &104u32.to_be_bytes());
    if let Some((name, format)) = backing {
        put(8, &400u64.to_be_bytes());
        put(16, &(name.len() as u32).to_be_bytes());
        put(400, name.as_bytes());
        put(104, &0xe279_2acau32.to_be_bytes());
        put(108, &(format.len() as u32).to_be_bytes());
        put(112, format.as_bytes());
    }
    put(CLUSTER, &((2 * CLUSTER as u64) | (1 << 63)).to_be_bytes());
    let second = 2 * CLUSTER;
    put(second + 8, &((3 * CLUSTER as u64) | (1 << 63)).to_be_bytes());
    put(3 * CLUSTER, &[0xaa; CLUSTER]);
    let mut deflate = DeflateEncoder::new(Vec::new(), Compression::best());
    deflate.write_all(&[0xbb; CLUSTER]).expect("memory");
    let packed = deflate.finish().expect("memory");
    put(4 * CLUSTER + 7, &packed);
    put(second + 16, &(1u64 << 62 | (4 * CLUSTER as u64 + 7)).to_be_bytes());
    put(second + 24, &1u64.to_be_bytes());
    b
}

const MAGIC: [u8; 4] = *b"QFI\xfb";

fn read_only() -> Options {
    Options { read_only: true, ..Options::default() }
}

fn complaint(bytes: &[u8], options: Options) -> String {
    Disk::open(&Temporary::with(bytes).0, options).expect_err("must not open")
}

#[test]
fn raw_is_read_written_and_padded_to_sectors() {
    let file = Temporary::with(&[7; 700]);
    let mut d = Disk::open(&file.0, Options::default()).expect("opens");
    assert_eq!(d.size(), 1024);
    let mut b = [1; 512];
    d.read(512, &mut b).expect("inside");
    assert_eq!((b[187], b[188]), (7, 0));
    d.write(1000, &[9; 24]).expect("inside");
    d.flush().expect("flushed");
    assert!(d.write(1001, &[9; 24]).is_err() && d.read(u64::MAX, &mut b).is_err());
    drop(d);
    let bytes = std::fs::read(&file.0).expect("there");
    assert_eq!((bytes.len(), bytes[999], bytes[1023]), (1024, 0, 9));
}

#[test]
fn a_snapshot_keeps_the_file_as_it_is() {
    let file = Temporary::with(&[7; 16384]);
    let mut d = Disk::open(&file.0, Options { snapshot: true, ..Options::default() }).expect("opens");
    d.write(4000, &[1; 200]).expect("inside");
    let mut b = [0; 16384];
    d.read(0, &mut b).expect("inside");
    let mut expected = [7; 16384];
    expected[4000..4200].fill(1);
    assert_eq!(b, expected);
    drop(d);
    assert_eq!(std::fs::read(&file.0).expect("there"), [7; 16384]);
}

#[test]
fn qcow2_clusters_of_each_kind() {
    let base = Temporary::with(&[0xcc; 5 * CLUSTER]);
    let name = base.0.file_name().expect("a name").to_str().expect("text").to_owned();
    for (backing, there) in [(None, 0), (Some((&*name, "raw")), 0xcc)] {
        let file = Temporary::with(&image(backing));
        let mut d = Disk::open(&file.0, read_only()).expect("opens");
        assert_eq!(d.size(), 16 * CLUSTER as u64);
        let mut b = vec![1; 16 * CLUSTER];
        d.read(0, &mut b).expect("inside");
        for (n, expected) in [there, 0xaa, 0xbb, 0, there, 0, 0].into_iter().enumerate() {
            assert_eq!(b[n * CLUSTER..][..CLUSTER], [expected; CLUSTER], "cluster {n}");
        }
        let mut across = [0; 20];
        d.read(2 * CLUSTER as u64 - 10, &mut across).expect("inside");
        assert_eq!((across[9], across[10]), (0xaa, 0xbb));
        assert!(d.write(0, &[0]).is_err());
    }
}

/// The counts of a qcow2's clusters, by its first block.
fn counts(bytes: &[u8]) -> Vec<u8> {
    bytes[6 * CLUSTER..7 * CLUSTER].chunks(2).map(|c| c[1]).collect()
}

#[test]
fn a_qcow2_is_written() {
    let base = Temporary::with(&[0xcc; 5 * CLUSTER]);
    let name = base.0.file_name().expect("a name").to_str().expect("text").to_owned();
    let file = Temporary::with(&image(Some((&name, "raw"))));
    let mut expected: Vec<u8> = [0xcc, 0xaa, 0xbb, 0, 0xcc].into_iter().flat_map(|b| [b; CLUSTER]).collect();
    expected.resize(16 * CLUSTER, 0);
    let mut d = Disk::open(&file.0, Options::default()).expect("opens");
    // Part of a plain cluster; of a compressed one and of zeros; of one behind; of several that are nowhere; the last bytes.
    for (at, len, v) in
        [(600, 9, 1), (1400, 200, 2), (2100, 4, 3), (3000, 2000, 4), (16 * CLUSTER - 3, 3, 5), (3010, 5, 6)]
    {
        d.write(at as u64, &vec![v; len]).expect("inside");
        expected[at..at + len].fill(v);
    }
    d.flush().expect("flushed");
    drop(d);
    for _ in 0..2 {
        let mut d = Disk::open(&file.0, Options::default()).expect("opens again");
        let mut b = vec![1; 16 * CLUSTER];
        d.read(0, &mut b).expect("inside");
        assert_eq!(b, expected);
    }
    assert_eq!(std::fs::read(&base.0).expect("there"), [0xcc; 5 * CLUSTER], "what is behind stays");
    // New: 2, 3, 4, 5 to 9 (5 has bytes from 3000 on), 15; the compressed one is nobody's now.
    let bytes = std::fs::read(&file.0).expect("there");
    let new = (bytes.len() - 8 * CLUSTER) / CLUSTER;
    assert_eq!(counts(&bytes)[..8 + new + 1], [&[1, 1, 1, 1, 0, 1, 1, 0][..], &vec![1; new], &[0]].concat());
    assert_eq!(new, 9);
}

/// A disk of 24 MiB, of which the table of counts knows 8: it grows, is where the header says, and counts each cluster that is in use once.
#[test]
fn the_table_of_counts_grows() {
    const SIZE: usize = 24 << 20;
    // First-level entries are for 32 KiB; the table of counts is behind them, and its block.
    let (l1, table, block) = (CLUSTER, 13 * CLUSTER, 14 * CLUSTER);
    let mut b = image(None)[..CLUSTER].to_vec();
    b.resize(15 * CLUSTER, 0);
    let mut put = |at: usize, v: &[u8]| b[at..at + v.len()].copy_from_slice(v);
    put(24, &(SIZE as u64).to_be_bytes());
    put(36, &768u32.to_be_bytes());
    put(40, &(l1 as u64).to_be_bytes());
    put(48, &(table as u64).to_be_bytes());
    put(table, &(block as u64).to_be_bytes());
    put(block, &[0, 1].repeat(15));
    let file = Temporary::with(&b);
    let content: Vec<u8> = (0..9u32 << 20).map(|n| (n >> 9) as u8 | 1).collect();
    let mut d = Disk::open(&file.0, Options::default()).expect("opens, and the table grows");
    for (n, part) in content.chunks(100_000).enumerate() {
        d.write(n as u64 * 100_000, part).expect("inside");
    }
    drop(d);
    let mut d = Disk::open(&file.0, Options::default()).expect("opens again");
    let mut back = vec![0; content.len()];
    d.read(0, &mut back).expect("inside");
    assert!(back == content);
    drop(d);
    let bytes = std::fs::read(&file.0).expect("there");
    let word = |at: usize| u64::from_be_bytes(bytes[at..at + 8].try_into().expect("eight")) as usize;
    let (at, clusters) = (word(48), word(56) >> 32);
    assert!(at > block && clusters > 1, "{at:#x} {clusters}");
    let count = |cluster: usize| match word(at + cluster / 256 * 8) {
        0 => 0,
        block => bytes[block + cluster % 256 * 2 + 1],
    };
    let uncounted = (0..bytes.len().div_ceil(CLUSTER)).filter(|n| count(*n) != 1).collect::<Vec<_>>();
    assert_eq!(uncounted, [table / CLUSTER], "all but the old table");
}

/// Many writes by chance into images of qemu-img's, which then finds nothing wrong with them.
#[test]
fn qemu_img_finds_what_was_written_right() {
    if Command::new("qemu-img").arg("--version").output().is_err() {
        eprintln!("skipped: qemu-img is not installed");
        return;
    }
    let run = |args: &[&str]| {
        let out = Command::new("qemu-img").args(args).output().expect("starts");
        assert!(out.status.success(), "qemu-img {args:?}: {}", String::from_utf8_lossy(&out.stdout));
    };
    let path = |t: &Temporary| t.0.to_str().expect("text").to_owned();
    let first: Vec<u8> =
        (0..4_000_000u64).map(|n| if n / 90_000 % 2 == 0 { ((n * n) >> 11) as u8 } else { 0 }).collect();
    let raw = Temporary::with(&first);
    for options in [
        &["-o", "compat=0.10"][..],
        &["-o", "compat=1.1"],
        &["-c"],
        &["-c", "-o", "cluster_size=4096"],
        &["-o", "cluster_size=1024"],
        &["-o", "cluster_size=512"],
    ] {
        let image = Temporary::name(".qcow2");
        run(&[&["convert", "-O", "qcow2"], options, &[&path(&raw), &path(&image)]].concat());
        let front = Temporary::name("-front.qcow2");
        run(&["create", "-q", "-f", "qcow2", "-b", &path(&image), "-F", "qcow2", &path(&front)]);
        // The one in front first, for it shows the other.
        for file in [&front, &image] {
            let mut content = first.clone();
            let mut d = Disk::open(&file.0, Options::default()).expect("opens");
            let mut seed = 88_172_645_463_325_252u64;
            let mut chance = |below: u64| {
                seed ^= seed << 13;
                seed ^= seed >> 7;
                seed ^= seed << 17;
                seed % below
            };
            for n in 0..200 {
                let at = chance(content.len() as u64 - 1) as usize;
                let len = (1 + chance(if n % 8 == 0 { 200_000 } else { 3000 }) as usize).min(content.len() - at);
                d.write(at as u64, &vec![n; len]).expect("inside");
                content[at..at + len].fill(n);
            }
            d.flush().expect("flushed");
            drop(d);
            run(&["check", "-q", &path(file)]);
            let back = Temporary::name(".raw");
            run(&["convert", "-O", "raw", &path(file), &path(&back)]);
            assert!(std::fs::read(&back.0).expect("there")[..content.len()] == content, "{options:?}");
        }
    }
}

#[test]
fn what_cannot_be_a_disk_says_why() {
    assert_eq!(complaint(b"", Options::default()), "is empty");
    let qcow2 = Options { format: Some(Format::Qcow2), ..read_only() };
    assert!(complaint(&[0; 512], qcow2).starts_with("not a qcow2 image"));
    assert!(complaint(&image(None)[..90], qcow2).contains("truncated"));
    assert!(complaint(&image(None)[..CLUSTER], qcow2).contains("truncated"));
    assert!(complaint(&image(Some(("nowhere", "raw"))), qcow2).contains("nowhere: No such file"));
    for (at, byte, word) in
        [(54, 0, "truncated"), (63, 1, "snapshots"), (79, 1, "repair"), (99, 5, "16 bits"), (29, 0x40, "first-level")]
    {
        let mut b = image(None);
        b[at] = byte;
        assert!(complaint(&b, Options::default()).contains(word), "{word}: {}", complaint(&b, Options::default()));
    }
    for (at, byte, word) in [
        (7, 9, "version"),
        (35, 1, "encrypted"),
        (23, 5, "clusters"),
        (31, 1, "first-level"),
        (79, 2, "corrupt"),
        (79, 16, "subclusters"),
        (79, 0x20, "unknown"),
        (39, 0, "first-level"),
    ] {
        let mut b = image(None);
        b[at] = byte;
        if at == 31 {
            b[26] = 0xff;
        }
        assert!(complaint(&b, qcow2).contains(word), "{word}: {}", complaint(&b, qcow2));
    }
    let missing = Disk::open(Path::new("/nowhere/at/all"), Options::default()).expect_err("not there");
    assert!(missing.starts_with("No such file"));
    assert_eq!(Disk::open(Path::new("/"), read_only()).expect_err("no file"), "is a directory");
}

#[test]
fn an_image_that_backs_itself_ends() {
    let file = Temporary::name("-self");
    let name = file.0.file_name().expect("a name").to_str().expect("text").to_owned();
    std::fs::write(&file.0, image(Some((&name, "qcow2")))).expect("written");
    assert!(Disk::open(&file.0, read_only()).expect_err("endless").contains("behind one another"));
}

#[test]
fn a_written_disk_is_nobody_elses() {
    let file = Temporary::with(&[0; 512]);
    let first = Disk::open(&file.0, Options::default()).expect("opens");
    assert!(Disk::open(&file.0, Options::default()).expect_err("twice").contains("in use"));
    assert!(Disk::open(&file.0, read_only()).expect_err("while written").contains("in use"));
    drop(first);
    let _one = Disk::open(&file.0, read_only()).expect("opens");
    Disk::open(&file.0, read_only()).expect("readers share");
}

/// A guest must not turn its raw disk into an image that names a file of the host, to be guessed at the next start.
#[test]
fn a_guessed_raw_disk_does_not_become_a_qcow2() {
    let file = Temporary::with(&[0; 1024]);
    let mut d = Disk::open(&file.0, Options::default()).expect("opens");
    assert!(d.write(0, &image(None)[..512]).is_err());
    d.write(0, b"QFI").expect("not yet");
    assert!(d.write(3, b"\xfb").is_err());
    drop(d);
    let mut d = Disk::open(&file.0, Options { format: Some(Format::Raw), ..Options::default() }).expect("opens");
    d.write(0, &image(None)[..512]).expect("it was said to be raw");
}

/// What QEMU's own tool makes: random bytes, compressed, version 2 and 3, two sizes of cluster, an image in front of another.
#[test]
fn images_of_qemu_img() {
    if Command::new("qemu-img").arg("--version").output().is_err() {
        eprintln!("skipped: qemu-img is not installed");
        return;
    }
    let run = |args: &[&str]| {
        let out = Command::new("qemu-img").args(args).output().expect("starts");
        assert!(out.status.success(), "qemu-img {args:?}: {}", String::from_utf8_lossy(&out.stderr));
    };
    let mut content: Vec<u8> = (0..300_000u64).map(|n| (n.wrapping_mul(n) >> 9) as u8).collect();
    content[70_000..200_000].fill(0);
    content.resize(content.len().next_multiple_of(512), 0);
    let raw = Temporary::with(&content);
    let path = |t: &Temporary| t.0.to_str().expect("text").to_owned();
    for options in [&["-o", "compat=0.10"][..], &["-o", "compat=1.1"], &["-c"], &["-c", "-o", "cluster_size=4096"]] {
        let image = Temporary::name(".qcow2");
        run(&[&["convert", "-O", "qcow2"], options, &[&path(&raw), &path(&image)]].concat());
        let front = Temporary::name("-front.qcow2");
        run(&["create", "-q", "-f", "qcow2", "-b", &path(&image), "-F", "qcow2", &path(&front)]);
        for file in [&image, &front] {
            let mut d = Disk::open(&file.0, read_only()).expect("opens");
            assert_eq!(d.size(), content.len() as u64);
            let mut b = vec![0; content.len()];
            d.read(0, &mut b).expect("inside");
            assert!(b == content, "{options:?}");
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    /// Whatever is wrong with an image, it is an error or bytes, never a panic.
    #[test]
    fn damaged_images_do_no_harm(
        changes in prop::collection::vec((0usize..CLUSTER * 4, any::<u8>()), 1..24), cut in 0usize..CLUSTER * 8,
    ) {
        let mut b = image(None);
        for (at, v) in changes {
            // Half of them where the header and the tables are.
            b[if at % 2 == 0 { at } else { at % 112 }] = v;
        }
        b.truncate(b.len() - cut / 4);
        let file = Temporary::with(&b);
        if let Ok(mut d) = Disk::open(&file.0, Options { format: Some(Format::Qcow2), ..Options::default() }) {
            for at in 0..d.size().min(20 * CLUSTER as u64) / 100 {
                let _ = d.write(100 * at, &[at as u8; 50]);
            }
        }
        if let Ok(mut d) = Disk::open(&file.0, Options { format: Some(Format::Qcow2), ..read_only() }) {
            let mut to = vec![0; d.size().min(1 << 16) as usize];
            let _ = d.read(0, &mut to);
            let _ = d.read(d.size().saturating_sub(to.len() as u64), &mut to);
        }
    }
}
