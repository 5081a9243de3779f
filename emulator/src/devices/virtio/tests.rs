//! Devices driven as a guest drives them: by the book, against it, and at random.

use super::balloon::{Balloon, Target};
use super::block::Block;
use super::console::Console;
use super::net::{Net, Wire};
use super::rng::Rng;
use super::testing::{BASE, Driver, FREE, INDIRECT, NEXT, RAM, SIZE, WRITE};
use super::{Device, LARGEST};
use crate::devices::disk::{Disk, Options};
use crate::mem::PAGE_SIZE;
use proptest::prelude::*;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex};

/// A disk of `sectors` sectors, each filled with its number, whose file is gone already.
fn disk(sectors: u8, options: Options) -> Arc<Mutex<Disk>> {
    static FILES: AtomicU32 = AtomicU32::new(0);
    let n = FILES.fetch_add(1, Ordering::Relaxed);
    let path = std::env::temp_dir().join(format!("bivisor-virtio-{}-{n}", std::process::id()));
    std::fs::write(&path, (0..sectors).flat_map(|n| [n; 512]).collect::<Vec<_>>()).expect("a temporary file");
    let disk = Disk::open(&path, options).expect("opens");
    std::fs::remove_file(&path).expect("there");
    Arc::new(Mutex::new(disk))
}

fn block() -> Box<dyn Device> {
    Box::new(Block::new(disk(8, Options::default()), "a serial number longer than it can be"))
}

fn rng() -> Box<dyn Device> {
    Box::new(Rng::new(Box::new(std::io::repeat(0x77))))
}

fn console() -> Box<dyn Device> {
    Box::new(Console::new(Box::new(std::io::sink())))
}

fn balloon() -> Box<dyn Device> {
    Box::new(Balloon::new(Arc::default()))
}

/// Each kind of device.
fn kinds() -> Vec<fn() -> Box<dyn Device>> {
    vec![block, rng, console, balloon, net]
}

type Frames = Vec<Vec<u8>>;

/// Frames sent, and frames to come.
#[derive(Clone, Default)]
struct Loop(Arc<Mutex<(Frames, Frames)>>);

impl Wire for Loop {
    fn send(&mut self, frame: &[u8]) {
        self.0.lock().expect("not poisoned").0.push(frame.to_vec());
    }
    fn receive(&mut self) -> Option<Vec<u8>> {
        self.0.lock().expect("not poisoned").1.pop()
    }
}

fn net() -> Box<dyn Device> {
    let endless = Loop::default();
    endless.0.lock().expect("not poisoned").1 = vec![vec![9; 100]; 500];
    Box::new(Net::new([2; 6], Box::new(endless)))
}

#[test]
fn a_network_card_sends_and_receives_frames() {
    let cable = Loop::default();
    let mut d = Driver::new(Box::new(Net::new([1, 2, 3, 4, 5, 6], Box::new(cable.clone()))), 1 << 5, true);
    assert_eq!([0, 4].map(|at| d.read(BASE + 0x2000 + at, 4)), [0x0403_0201, 0x0605]);
    d.put(DATA, &[0; 12]);
    d.put(DATA + 12, b"a frame");
    d.offer(1, &[(DATA, 14, false), (DATA + 14, 5, false)]);
    assert_eq!(d.used(1), Some((0, 0)));
    assert_eq!(cable.0.lock().expect("not poisoned").0, [b"a frame".to_vec()]);
    cable.0.lock().expect("not poisoned").1 = vec![b"two".to_vec(), b"one".to_vec()];
    d.offer(0, &[(DATA, 20, true)]);
    assert_eq!((d.used(0), &d.get::<15>(DATA)[9..]), (Some((0, 15)), &[0, 1, 0, b'o', b'n', b'e'][..]));
    d.offer(0, &[(DATA, 14, true), (DATA + 14, 100, true)]);
    assert_eq!((d.used(0), &d.get::<15>(DATA)[12..]), (Some((0, 15)), &b"two"[..]));
    d.offer(0, &[(DATA, 100, true)]);
    assert_eq!(d.used(0), None, "nothing has come");
    d.messages();
    cable.0.lock().expect("not poisoned").1 = vec![b"three".to_vec()];
    d.pci.input(&[]);
    assert_eq!((d.used(0), d.messages()), (Some((0, 17)), vec![(0xfee0_0000, 0x41)]));
    d.offer(1, &[(DATA, 11, false)]);
    assert_eq!(d.status(), 0x4f, "less than a header");
}

#[test]
fn entropy_fills_what_can_be_written() {
    let mut d = Driver::new(rng(), 0, true);
    d.offer(0, &[(DATA, 100, true), (DATA + 200, 100, true)]);
    assert_eq!((d.used(0), d.messages()), (Some((0, 200)), vec![(0xfee0_0000, 0x41)]));
    assert_eq!((d.get::<101>(DATA)[99..].to_vec(), d.get::<1>(DATA + 299)), (vec![0x77, 0], [0x77]));
    d.offer(0, &[(DATA, RAM as u32 / 2, true)]);
    assert_eq!(d.used(0), Some((0, 4096)), "no more at once");
}

#[test]
fn a_console_speaks_and_listens() {
    #[derive(Clone, Default)]
    struct Said(Arc<Mutex<Vec<u8>>>);
    impl std::io::Write for Said {
        fn write(&mut self, b: &[u8]) -> std::io::Result<usize> {
            self.0.lock().expect("not poisoned").write(b)
        }
        fn flush(&mut self) -> std::io::Result<()> {
            Ok(())
        }
    }
    let said = Said::default();
    let mut d = Driver::new(Box::new(Console::new(Box::new(said.clone()))), 0, true);
    d.put(DATA, b"hello, ");
    d.put(DATA + 64, b"world");
    d.offer(1, &[(DATA, 7, false), (DATA + 64, 5, false)]);
    assert_eq!((d.used(1), &said.0.lock().expect("not poisoned")[..]), (Some((0, 0)), &b"hello, world"[..]));
    assert_eq!(d.messages(), [(0xfee0_0000, 0x42)]);
    // What is typed waits for buffers, and is cut into them.
    d.pci.input(b"typed early");
    assert_eq!(d.used(0), None);
    d.offer(0, &[(DATA, 6, true)]);
    assert_eq!((d.used(0), &d.get::<6>(DATA)), (Some((0, 6)), b"typed "));
    d.offer(0, &[(DATA, 16, true)]);
    assert_eq!((d.used(0), &d.get::<5>(DATA)), (Some((0, 5)), b"early"));
    d.offer(0, &[(DATA, 16, true)]);
    assert_eq!((d.used(0), d.messages().len()), (None, 2));
    d.pci.input(b"!");
    assert_eq!((d.used(0), d.messages(), d.get::<1>(DATA)), (Some((0, 1)), vec![(0xfee0_0000, 0x41)], *b"!"));
}

/// Virtual I/O Device 1.2, 5.3.4: with VIRTIO_CONSOLE_F_SIZE the configuration has columns and rows, and a change is told.
#[test]
fn a_console_tells_the_size_of_its_terminal() {
    let mut d = Driver::new(Box::new(Console::new(Box::new(std::io::sink())).on_terminal(80, 25)), 1, true);
    assert_eq!(d.read(BASE + 0x2000, 4), 25 << 16 | 80);
    let generation = d.read(BASE + 0x15, 1);
    d.pci.resize(80, 25);
    assert_eq!((d.read(BASE + 0x15, 1), d.messages().len()), (generation, 0), "the same size");
    d.pci.resize(132, 43);
    assert_eq!(d.read(BASE + 0x2000, 4), 43 << 16 | 132);
    assert_ne!(d.read(BASE + 0x15, 1), generation);
    assert_eq!(d.messages(), [(0xfee0_0000, 0x40)]);
    // Where there is no terminal nothing is offered, and nothing changes.
    let mut d = Driver::new(Box::new(Console::new(Box::new(std::io::sink()))), 0, true);
    d.pci.resize(132, 43);
    assert_eq!((d.read(BASE + 0x2000, 4), d.messages().len()), (0, 0));
}

#[test]
fn a_balloon_gives_pages_back() {
    let target = Arc::new(Target::default());
    target.pages.store(5, Ordering::Relaxed);
    let mut d = Driver::new(Box::new(Balloon::new(target.clone())), 0, true);
    assert_eq!(d.read(BASE + 0x2000, 4), 5);
    let first = (FREE / PAGE_SIZE) as u32 + 4;
    d.put(u64::from(first) * PAGE_SIZE, &[1; 5 * PAGE_SIZE as usize]);
    let numbers = [first, first + 1, first + 3, first + 2].map(u32::to_le_bytes).concat();
    d.put(DATA, &numbers);
    d.offer(0, &[(DATA, 16, false)]);
    assert_eq!((d.used(0), target.freed.load(Ordering::Relaxed)), (Some((0, 0)), 4));
    let seen: Vec<u8> = (0..5).map(|n| d.get::<1>(u64::from(first + n) * PAGE_SIZE + 9)[0]).collect();
    assert_eq!(seen, [0, 0, 0, 0, 1]);
    d.write(BASE + 0x2004, 4, 4);
    assert_eq!((target.given.load(Ordering::Relaxed), d.read(BASE + 0x2004, 4)), (4, 4));
    d.offer(1, &[(DATA, 16, false)]);
    assert_eq!(d.used(1), Some((0, 0)), "deflated");
    d.put(DATA, &((RAM / PAGE_SIZE) as u32).to_le_bytes());
    d.offer(0, &[(DATA, 4, false)]);
    assert_eq!(d.status(), 0x4f, "no such page");
}

const HEADER: u64 = FREE;
const DATA: u64 = FREE + PAGE_SIZE;
const STATUS: u64 = FREE + 2 * PAGE_SIZE;

/// A request to a disk; gives status and the bytes that were written.
fn request(d: &mut Driver, kind: u32, sector: u64, data: u32) -> (u8, u32) {
    d.put(HEADER, &[&kind.to_le_bytes()[..], &[0; 4], &sector.to_le_bytes()].concat());
    d.put(STATUS, &[0xee]);
    d.offer(0, &[(HEADER, 16, false), (DATA, data, kind != 1), (STATUS, 1, true)]);
    let (head, written) = d.used(0).expect("given back");
    assert_eq!((head, d.used(0)), (0, None));
    (d.get::<1>(STATUS)[0], written)
}

#[test]
fn a_disk_reads_writes_and_has_a_name() {
    let mut d = Driver::new(block(), 0, true);
    assert_eq!([0, 8, 12].map(|at| d.read(BASE + 0x2000 + at, 4)), [8, 0, 254], "capacity, segments");
    assert_eq!(request(&mut d, 0, 3, 1024), (0, 1025));
    assert_eq!((d.get::<512>(DATA), d.get::<512>(DATA + 512)), ([3; 512], [4; 512]));
    assert_eq!(d.messages(), [(0xfee0_0000, 0x41)]);
    d.put(DATA, &[0x5a; 512]);
    assert_eq!(request(&mut d, 1, 7, 512), (0, 1));
    assert_eq!(request(&mut d, 4, 0, 0), (0, 1), "flush");
    d.put(DATA, &[0; 512]);
    assert_eq!(request(&mut d, 0, 7, 512), (0, 513));
    assert_eq!(d.get::<512>(DATA), [0x5a; 512]);
    assert_eq!(request(&mut d, 8, 0, 20), (0, 21));
    assert_eq!(&d.get::<20>(DATA), b"a serial number long");
}

#[test]
fn what_a_disk_cannot_do_is_an_error_of_the_request() {
    const ERROR: u8 = 1;
    let mut d = Driver::new(block(), 0, true);
    for (kind, sector, len) in [(0, 8, 512), (0, 7, 1024), (1, u64::MAX, 512), (0, u64::MAX / 512, 512), (0, 0, 100)] {
        assert_eq!(request(&mut d, kind, sector, len).0, ERROR, "{kind} {sector} {len}");
    }
    assert_eq!(request(&mut d, 77, 0, 512).0, 2, "unknown");
    assert_eq!(d.status(), 0xf, "the device goes on");
    let read_only = Block::new(disk(8, Options { read_only: true, ..Options::default() }), "");
    assert_eq!(read_only.features() >> 5 & 1, 1);
    let mut d = Driver::new(Box::new(read_only), 1 << 5, false);
    assert_eq!(request(&mut d, 1, 0, 512).0, ERROR);
}

/// A host's file that cannot be read or written any more, in the middle.
#[test]
fn a_file_that_fails_in_mid_run_is_an_error_of_the_request() {
    let backing = disk(8, Options::default());
    let mut d = Driver::new(Box::new(Block::new(backing.clone(), "")), 0, true);
    assert_eq!(request(&mut d, 0, 3, 512).0, 0);
    let disk = || backing.lock().expect("no panic under the lock");
    let file = disk().fail(true);
    assert_eq!(request(&mut d, 0, 4, 512).0, 1, "VIRTIO_BLK_S_IOERR");
    disk().mend(file);
    assert_eq!(request(&mut d, 0, 4, 512).0, 0);
    assert_eq!(d.get::<512>(DATA), [4; 512]);
    let file = disk().fail(false);
    assert_eq!(request(&mut d, 1, 4, 512).0, 1);
    assert_eq!(request(&mut d, 4, 0, 0).0, 1, "flush");
    disk().mend(file);
    assert_eq!((request(&mut d, 1, 4, 512).0, d.status()), (0, 0xf), "the device goes on");
}

/// A request of gigabytes, all of the same RAM, costs no time.
#[test]
fn a_request_is_not_larger_than_it_may_be() {
    let mut d = Driver::new(block(), 0, true);
    d.put(HEADER, &[0; 16]);
    let buffers = LARGEST as u64 / RAM + 1;
    let table = FREE + 8 * PAGE_SIZE;
    let put = |n: u64, at: u64, len: u64, flags: u16| {
        d.put(table + 16 * n, &[at.to_le_bytes(), [0; 8]].concat());
        d.put(table + 16 * n + 8, &(len as u32).to_le_bytes());
        d.put(table + 16 * n + 12, &[flags.to_le_bytes(), (n as u16 + 1).to_le_bytes()].concat());
    };
    put(0, HEADER, 16, NEXT);
    (1..=buffers).for_each(|n| put(n, 0, RAM, NEXT | WRITE));
    put(buffers + 1, STATUS, 1, WRITE);
    d.descriptor(0, 0, (table, 16 * (buffers as u32 + 2), INDIRECT, 0));
    d.avail(0, 0);
    d.kick(0);
    assert_eq!((d.used(0), d.get::<1>(STATUS)), (Some((0, 1)), [1]));
}

#[test]
fn code_that_a_disk_overwrites_is_stale() {
    let mut d = Driver::new(block(), 0, true);
    d.mem.watch_code(DATA);
    let (epoch, generation) = (d.mem.code_epoch(), d.mem.code_generation(DATA));
    assert_eq!(request(&mut d, 0, 1, 512).0, 0);
    assert!(d.mem.code_epoch() != epoch && d.mem.code_generation(DATA) != generation);
}

#[test]
fn interrupts_by_line_by_message_masked_and_suppressed() {
    let mut d = Driver::new(block(), 0, false);
    assert!(!d.pci.intx());
    request(&mut d, 0, 0, 512);
    assert!(d.pci.intx() && d.messages().is_empty());
    assert_eq!((d.read(BASE + 0x1000, 1), d.pci.intx()), (1, false), "reading the status takes it away");
    request(&mut d, 0, 0, 512);
    d.pci.write_config(5, 4);
    assert!(!d.pci.intx(), "the command register can turn it off");

    let mut d = Driver::new(block(), 0, true);
    d.write(BASE + 0x401c, 4, 1);
    request(&mut d, 0, 0, 512);
    assert_eq!((d.messages(), d.read(BASE + 0x4800, 4)), (vec![], 2), "masked: pending");
    d.write(BASE + 0x401c, 4, 0);
    assert_eq!((d.messages(), d.read(BASE + 0x4800, 4)), (vec![(0xfee0_0000, 0x41)], 0));
    assert!(!d.pci.intx());

    // With event indices the driver says how far it wants to hear nothing.
    let mut d = Driver::new(block(), 1 << 29, true);
    let event = Driver::rings(0).1 + 4 + 2 * u64::from(SIZE);
    d.put(event, &2u16.to_le_bytes());
    let told = [0; 3].map(|_| {
        request(&mut d, 0, 0, 512);
        d.messages().len()
    });
    assert_eq!(told, [0, 0, 1]);
}

#[test]
fn a_driver_that_breaks_the_rules_gets_a_device_that_needs_a_reset() {
    type Breach = fn(&mut Driver);
    const NEEDS_RESET: u64 = 0x40;
    let outside = |d: &mut Driver| d.descriptor(0, 0, (RAM - 8, 16, 0, 0));
    let no_status = |d: &mut Driver| d.descriptor(0, 0, (HEADER, 16, 0, 0));
    let short = |d: &mut Driver| d.descriptor(0, 0, (HEADER, 15, 0, 0));
    let far = |d: &mut Driver| d.descriptor(0, 0, (u64::MAX - 3, 16, 0, 0));
    let loops = |d: &mut Driver| d.descriptor(0, 0, (HEADER, 1 << 28, NEXT, 0));
    let nested = |d: &mut Driver| d.descriptor(0, 0, (Driver::rings(0).0, 16, INDIRECT, 0));
    let too_many = |d: &mut Driver| d.put(Driver::rings(0).1 + 2, &(SIZE + 1).to_le_bytes());
    let head = |d: &mut Driver| d.avail(0, SIZE);
    let cases: [(&str, Breach); 8] = [
        ("outside", outside),
        ("no status", no_status),
        ("short", short),
        ("far", far),
        ("loops", loops),
        ("nested", nested),
        ("too many", too_many),
        ("head", head),
    ];
    for (name, case) in cases {
        let mut d = Driver::new(block(), 0, true);
        case(&mut d);
        if !matches!(name, "too many" | "head") {
            d.avail(0, 0);
        }
        d.kick(0);
        assert_eq!(d.status(), 0xf | NEEDS_RESET, "{name}");
        assert_eq!(d.messages().last(), Some(&(0xfee0_0000, 0x40)), "{name}: the configuration's vector");
        d.kick(0);
        assert_eq!(d.used(0), None, "{name}: it does nothing any more");
        d.write(BASE + 0x14, 1, 0);
        assert_eq!(d.status(), 0, "{name}: a reset helps");
    }
}

#[test]
fn features_that_were_not_offered_are_not_accepted() {
    for features in [0u64, 1 << 32 | 1 << 50, 1 << 32 | 1] {
        let mut d = Driver::cold(block());
        d.write(BASE + 0x14, 1, 3);
        for half in 0..2 {
            d.write(BASE + 8, 4, half);
            d.write(BASE + 0xc, 4, features >> (32 * half) & 0xffff_ffff);
        }
        d.write(BASE + 0x14, 1, 0xb);
        assert_eq!(d.status(), 3, "{features:#x}");
    }
}

/// The window of the configuration space (4.1.4.9) shows the same registers.
#[test]
fn registers_by_configuration_space() {
    let mut d = Driver::cold(block());
    let mut at = d.pci.read_config(0x34);
    while (d.pci.read_config(at), d.pci.read_config(at + 3)) != (9, 5) {
        at = d.pci.read_config(at + 1);
    }
    let point = |d: &mut Driver, offset: u32, len: u8| {
        offset.to_le_bytes().into_iter().zip(at + 8..).for_each(|(b, at)| d.pci.write_config(at, b));
        d.pci.write_config(at + 12, len);
    };
    point(&mut d, 0x14, 1);
    d.pci.write_config(at + 16, 3);
    assert_eq!((d.status(), d.pci.read_config(at + 16)), (3, 3));
    point(&mut d, 0x2000, 4);
    assert_eq!([0, 1, 2, 3].map(|n| d.pci.read_config(at + 16 + n)), [8, 0, 0, 0]);
}

/// Bytes where the rings are, most of them small enough to mean something.
fn rings() -> impl Strategy<Value = Vec<(u64, u64)>> {
    let value = prop_oneof![0..64u64, any::<u64>(), FREE..RAM + 64, (0..64u32).prop_map(|n| 1 << n)];
    let at = prop_oneof![3 => 0..0x100u64, 1 => 0..0x1000u64];
    prop::collection::vec((at, value), 1..40)
}

#[derive(Clone, Copy, Debug)]
enum Access {
    ReadConfig(u8),
    WriteConfig(u8, u8),
    Read(u64, usize),
    Write(u64, usize, u64),
    Memory(u64, u64),
}

fn access() -> impl Strategy<Value = Access> {
    let width = || prop_oneof![Just(1usize), Just(2), Just(4), Just(8)];
    let value = || prop_oneof![0..0x20u64, any::<u64>(), Just(0xf), 0..RAM + 64, (0..64u32).prop_map(|n| 1 << n)];
    let place = || {
        prop_oneof![
            4 => 0..0x38u64,
            1 => 0x1000..0x1004u64,
            1 => 0x2000..0x2040u64,
            2 => 0x3000..0x3010u64,
            1 => 0x4000..0x4840u64,
            1 => 0..0x5000u64,
        ]
    };
    prop_oneof![
        1 => any::<u8>().prop_map(Access::ReadConfig),
        1 => (any::<u8>(), any::<u8>()).prop_map(|(at, v)| Access::WriteConfig(at, v)),
        2 => (place(), width()).prop_map(|(at, n)| Access::Read(at, n)),
        6 => (place(), width(), value()).prop_map(|(at, n, v)| Access::Write(at, n, v)),
        2 => (0..RAM, value()).prop_map(|(at, v)| Access::Memory(at, v)),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 300, failure_persistence: None, ..ProptestConfig::default() })]

    /// Rings and descriptors full of anything: no panic, no end that does not come, and a device that can be reset.
    #[test]
    fn hostile_rings(writes in rings(), kind in any::<prop::sample::Index>(), features in any::<bool>()) {
        let device = kind.get(&kinds())();
        let queues = device.queues().len();
        let mut d = Driver::new(device, if features { 1 << 29 | 1 << 28 } else { 0 }, true);
        for n in 0..queues {
            let (table, avail, _) = Driver::rings(n);
            // A chain that works, then whatever is written over it.
            for i in 0..SIZE {
                d.descriptor(n, i, (FREE + PAGE_SIZE * u64::from(i), 512, ((i & 1) * WRITE) | NEXT, i + 1));
            }
            d.put(avail + 2, &4u16.to_le_bytes());
            for (at, v) in &writes {
                d.put(table + at, &v.to_le_bytes());
            }
        }
        for n in (0..queues).chain(0..queues) {
            d.kick(n);
            d.messages();
        }
        d.write(BASE + 0x14, 1, 0);
        prop_assert_eq!(d.status(), 0);
    }

    /// A guest that programs a device at random, before or after a driver has set it up.
    #[test]
    fn programmed_at_random(
        script in prop::collection::vec(access(), 1..120), kind in any::<prop::sample::Index>(), warm in any::<bool>(),
    ) {
        let device = kind.get(&kinds())();
        let mut d = if warm { Driver::new(device, 0, true) } else { Driver::cold(device) };
        for access in script {
            let mut b = [0; 8];
            match access {
                Access::ReadConfig(at) => _ = d.pci.read_config(at),
                Access::WriteConfig(at, v) => d.pci.write_config(at, v),
                Access::Read(at, n) => _ = d.pci.read_memory(BASE + at, &mut b[..n]),
                Access::Write(at, n, v) => _ = d.pci.write_memory(BASE + at, &v.to_le_bytes()[..n]),
                Access::Memory(at, v) => _ = d.mem.write(at, &v.to_le_bytes()),
            }
            d.pci.intx();
            prop_assert!(d.messages().len() < 1000);
        }
    }
}
