//! A guest that programs the board at random: every port, the memory of the APICs, the APIC's MSRs, with time that jumps. Nothing panics,
//! and every access comes back. `BIVISOR_BOARD_CASES=100000 cargo test --release -p bivisor-emulator --test board` takes longer.

use bivisor_emulator::bus::Bus;
use bivisor_emulator::devices::disk::{Disk, Options};
use bivisor_emulator::devices::ide::Kind;
use bivisor_emulator::devices::virtio::block::Block;
use bivisor_emulator::interp::Interpreter;
use bivisor_emulator::machine::{Config, Machine};
use proptest::prelude::*;
use proptest::test_runner::{RngSeed, TestRunner};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex};

#[derive(Clone, Copy, Debug)]
enum Access {
    In(u16, usize),
    Out(u16, u32, usize),
    Load(u64, usize),
    Store(u64, u64, usize),
    ReadMsr(u32),
    WriteMsr(u32, u64),
    Priority(u8),
    Take,
    Type(u8),
    Press(u8),
    Look,
    Wait(u64),
}

/// The ports of the chips.
const KNOWN: [std::ops::Range<u16>; 20] = [
    0x20..0x22,
    0x40..0x44,
    0x60..0x65,
    0x70..0x72,
    0x92..0x93,
    0xa0..0xa2,
    0xe0..0xea,
    0x170..0x178,
    0x1f0..0x1f8,
    0x376..0x377,
    0x3b0..0x3e0,
    0x3f6..0x3f7,
    0x3f8..0x400,
    0x4d0..0x4d2,
    0x510..0x514,
    0x600..0x610,
    0xcf8..0xcf9,
    0xcf8..0xd00,
    0x2000..0x2019,
    0xc000..0xc010,
];

/// Ports of one of the chips, or of any, most of the time.
fn port(chip: Option<usize>) -> impl Strategy<Value = u16> {
    let which = chip.map_or(0..KNOWN.len(), |n| n..n + 1);
    let known = (which, any::<u16>()).prop_map(|(n, i)| KNOWN[n].start + i % KNOWN[n].len() as u16);
    prop_oneof![9 => known, 1 => any::<u16>()]
}

fn address() -> impl Strategy<Value = u64> {
    let page = prop_oneof![
        Just(0xfec0_0000u64),
        Just(0xfee0_0000),
        Just(0xfe00_0000),
        Just(0xfe00_3000),
        Just(0xff00_0000),
        Just(0xffff_f000),
        any::<u64>()
    ];
    (page, 0..0x1000u64).prop_map(|(page, offset)| page.wrapping_add(offset & !3))
}

fn access(chip: Option<usize>) -> impl Strategy<Value = Access> {
    let width = prop_oneof![Just(1usize), Just(2), Just(4)];
    let wide = prop_oneof![Just(1usize), Just(2), Just(4), Just(8)];
    let msr = prop_oneof![Just(0x1bu32), Just(0x6e0), 0x800..0x900u32];
    // Small values are what registers are made of.
    let value = prop_oneof![0..0x100u64, any::<u64>(), 0..0x2_0000u64, (0..64u32).prop_map(|n| 1 << n)];
    prop_oneof![
        4 => (port(chip), width.clone()).prop_map(|(p, n)| Access::In(p, n)),
        8 => (port(chip), value.clone(), width).prop_map(|(p, v, n)| Access::Out(p, v as u32, n)),
        2 => (address(), wide.clone()).prop_map(|(a, n)| Access::Load(a, n)),
        4 => (address(), value.clone(), wide).prop_map(|(a, v, n)| Access::Store(a, v, n)),
        1 => msr.clone().prop_map(Access::ReadMsr),
        2 => (msr, value).prop_map(|(n, v)| Access::WriteMsr(n, v)),
        1 => (0..16u8).prop_map(Access::Priority),
        2 => Just(Access::Take),
        1 => any::<u8>().prop_map(Access::Type),
        1 => any::<u8>().prop_map(Access::Press),
        1 => Just(Access::Look),
        1 => (0..40u32).prop_map(|n| Access::Wait(1 << n)),
    ]
}

/// Four sectors, each filled with its number, in a file that is gone already.
fn disk() -> Arc<Mutex<Disk>> {
    static NEXT: AtomicU32 = AtomicU32::new(0);
    let n = NEXT.fetch_add(1, Ordering::Relaxed);
    let path = std::env::temp_dir().join(format!("bivisor-board-{}-{n}", std::process::id()));
    std::fs::write(&path, (0..4u8).flat_map(|n| [n; 512]).collect::<Vec<_>>()).expect("a temporary file");
    let disk = Disk::open(&path, Options::default()).expect("opens");
    std::fs::remove_file(&path).expect("there");
    Arc::new(Mutex::new(disk))
}

fn machine() -> Machine {
    let config = Config {
        rom: vec![0x90; 0x1_0000],
        ide: [Some((Kind::Disk, disk())), None, Some((Kind::Cd, disk())), None],
        firmware_files: vec![("genroms/some".into(), vec![0x55; 512])],
        virtio: vec![Box::new(Block::new(disk(), "disk"))],
        ..Config::for_tests(1 << 20)
    };
    Machine::new(Box::<Interpreter>::default(), config).expect("a small machine")
}

fn perform(bus: &dyn Bus, remote: &bivisor_emulator::machine::Remote, access: Access) {
    let mut data = [0; 8];
    match access {
        Access::In(p, n) => bus.read_port(p, &mut data[..n]),
        Access::Out(p, v, n) => bus.write_port(p, &v.to_le_bytes()[..n]),
        Access::Load(a, n) => bus.read_mmio(a, &mut data[..n]),
        Access::Store(a, v, n) => bus.write_mmio(a, &v.to_le_bytes()[..n]),
        Access::ReadMsr(n) => _ = bus.read_msr(n),
        Access::WriteMsr(n, v) => _ = bus.write_msr(n, v),
        Access::Priority(v) => bus.set_task_priority(v),
        Access::Take => {
            let pending = bus.interrupt_pending();
            let taken = bus.take_interrupt();
            // What was said to wait is there to be taken.
            assert!(!pending || taken.is_some(), "an interrupt that was pending has gone");
            bus.take_nmi();
        }
        Access::Type(byte) => remote.type_serial(&[byte]),
        Access::Press(code) => remote.press_keys(&[code]),
        Access::Look => {
            let screen = remote.screen();
            assert!(screen.is_none_or(|s| s.cells.len() <= 0x4000), "more than video memory holds");
        }
        Access::Wait(ns) => remote.pass_time(ns),
    }
}

/// The same accesses in every run; BIVISOR_BOARD_CASES=N for more of them.
fn programmed(chip: Option<usize>, cases: u32) {
    let cases = std::env::var("BIVISOR_BOARD_CASES").ok().and_then(|n| n.parse().ok()).unwrap_or(cases);
    let rng_seed = RngSeed::Fixed(chip.map_or(0, |n| n as u64 + 1));
    let config = ProptestConfig { cases, rng_seed, failure_persistence: None, ..ProptestConfig::default() };
    let done = TestRunner::new(config).run(&proptest::collection::vec(access(chip), 1..200), |script| {
        let mut machine = machine();
        machine.leave_firmware();
        let (board, remote) = (machine.board(), machine.remote());
        for access in script {
            perform(&*board, &remote, access);
        }
        Ok(())
    });
    done.unwrap_or_else(|why| panic!("{why}"));
}

#[test]
fn programmed_at_random() {
    programmed(None, 400);
}

#[test]
fn each_chip_programmed_at_random() {
    for chip in 0..KNOWN.len() {
        programmed(Some(chip), 40);
    }
}

/// Ticks of the 8254 that came while one waited are given when that is taken, one behind the other; those that nobody wanted are not.
#[test]
fn ticks_that_came_while_one_waited_are_made_up_for() {
    let taken = |ticks: u64, masked: bool, reprogrammed: bool| {
        let mut machine = machine();
        machine.leave_firmware();
        let (bus, remote) = (machine.board(), machine.remote());
        let out = |port: u16, v: u8| bus.write_port(port, &[v]);
        // ICW1 to ICW4: vector 0x20, the end of an interrupt by itself; input 0 unmasked or not.
        for (port, v) in [(0x20, 0x11), (0x21, 0x20), (0x21, 4), (0x21, 3), (0x21, if masked { 0xff } else { 0xfe })] {
            out(port, v);
        }
        let start = || [(0x43, 0x34), (0x40, 0xa9), (0x40, 4)].into_iter().for_each(|(port, v)| out(port, v));
        start();
        for _ in 0..ticks {
            remote.pass_time(1_000_000);
        }
        if reprogrammed {
            start();
        }
        out(0x21, 0xfe);
        std::iter::from_fn(|| bus.take_interrupt()).inspect(|v| assert_eq!(*v, 0x20)).count()
    };
    assert_eq!([1, 2, 10].map(|ticks| taken(ticks, false, false)), [1, 2, 10]);
    assert_eq!(taken(40, false, false), 17, "no more than 16 besides");
    // A masked input remembers one edge.
    assert_eq!((taken(10, true, false), taken(10, false, true)), (1, 1));
}

/// By ports, memory and interrupts alone: the way of a system's driver.
#[test]
fn a_disk_is_found_on_pci_reads_and_interrupts() {
    let mut machine = machine();
    machine.leave_firmware();
    let board = machine.board();
    let config = |function: u32, at: u32, v: Option<u32>| {
        board.write_port(0xcf8, &(1 << 31 | function << 8 | at).to_le_bytes());
        let mut b = [0; 4];
        match v {
            Some(v) => board.write_port(0xcfc, &v.to_le_bytes()),
            None => board.read_port(0xcfc, &mut b),
        }
        u32::from_le_bytes(b)
    };
    let functions: Vec<u32> = (0..256).filter(|f| config(*f, 0, None) == 0x1042_1af4).collect();
    assert_eq!(functions, [4 << 3], "one disk, device 4");
    let f = functions[0];
    let base = u64::from(config(f, 0x10, None));
    assert_eq!((base, config(f, 0x3c, None)), (0xfe00_0000, 0x10a), "INTA on line 10");
    config(f, 4, Some(6));
    let write = |at: u64, v: u32, n: usize| board.write_mmio(base + at, &v.to_le_bytes()[..n]);
    // Features: VERSION_1. One queue of 4 descriptors: table at 0x1000, available ring at 0x2000, used ring at 0x3000.
    for (at, v, n) in [
        (0x14, 3, 1),
        (8, 1, 4),
        (0xc, 1, 4),
        (0x14, 0xb, 1),
        (0x18, 4, 2),
        (0x20, 0x1000, 4),
        (0x28, 0x2000, 4),
        (0x30, 0x3000, 4),
        (0x1c, 1, 2),
        (0x14, 0xf, 1),
    ] {
        write(at, v, n);
    }
    let memory = machine.memory();
    for (n, (at, len, flags)) in [(0x4000u64, 16u32, 1u16), (0x5000, 512, 3), (0x6000, 1, 2)].into_iter().enumerate() {
        let d =
            [&at.to_le_bytes()[..], &len.to_le_bytes(), &flags.to_le_bytes(), &(n as u16 + 1).to_le_bytes()].concat();
        memory.write(0x1000 + 16 * n as u64, &d).expect("RAM");
    }
    memory.write(0x4008, &2u64.to_le_bytes()).expect("RAM");
    memory.write(0x6000, &[0xee]).expect("RAM");
    memory.write(0x2002, &[1]).expect("RAM");
    // The second 8259 lets line 10 through, and the first one the second.
    board.write_port(0xa1, &[0xfb]);
    board.write_port(0x21, &[0xfb]);
    assert!(!board.interrupt_pending());
    write(0x3000, 0, 2);
    let mut sector = [0; 512];
    memory.read(0x5000, &mut sector).expect("RAM");
    assert_eq!(sector, [2; 512]);
    assert!(board.interrupt_pending());
    assert_eq!(board.take_interrupt(), Some(0x72));
    let mut isr = [0];
    board.read_mmio(base + 0x1000, &mut isr);
    assert_eq!(isr, [1]);
    assert!(!board.interrupt_pending());
}
