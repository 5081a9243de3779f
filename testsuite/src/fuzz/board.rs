//! The PC's devices programmed at random, a target for each: ports, registers in memory and MSRs at all widths, RAM full of wild descriptors,
//! time, keys and interrupts in between. No panic, no access that does not come back.

use super::{Target, quietly};
use crate::random::Random;
use bivisor_emulator::bus::Bus;
use bivisor_emulator::devices::disk::{Disk, Options};
use bivisor_emulator::devices::ide::Kind;
use bivisor_emulator::devices::virtio;
use bivisor_emulator::devices::virtio::balloon::Balloon;
use bivisor_emulator::devices::virtio::block::Block;
use bivisor_emulator::devices::virtio::console::Console;
use bivisor_emulator::devices::virtio::net::{Net, Wire};
use bivisor_emulator::devices::virtio::rng::Rng;
use bivisor_emulator::interp::Interpreter;
use bivisor_emulator::machine::{Config, Machine, Pc, Remote};
use std::ops::RangeInclusive;
use std::path::PathBuf;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

/// An input that takes so long hangs a guest.
const PATIENCE: Duration = Duration::from_secs(5);
const RAM: u64 = 2 << 20;
/// Where the rings of a virtio device's first queue are; those of the next follow. Above, buffers.
const RINGS: u64 = 0x10_0000;
const PER_QUEUE: u64 = 0x1000;
const BUFFERS: u64 = 0x11_0000;
/// Memory of the first virtio device, and of each.
const VIRTIO: (u64, u64) = (0xfe00_0000, 0x8000);
/// Device number on PCI of the first.
const FIRST_VIRTIO: u64 = 4;
/// Descriptors of a queue.
const ENTRIES: u64 = 16;

/// What a device answers at.
pub struct Place {
    /// Its name as a target.
    pub name: &'static str,
    ports: &'static [RangeInclusive<u16>],
    memory: &'static [RangeInclusive<u64>],
    msrs: &'static [RangeInclusive<u32>],
    /// Its number among the virtio devices, and how many queues it has.
    virtio: Option<(u64, u64)>,
}

const fn at_ports(name: &'static str, ports: &'static [RangeInclusive<u16>]) -> Place {
    Place { name, ports, memory: &[], msrs: &[], virtio: None }
}

const fn in_memory(name: &'static str, memory: &'static [RangeInclusive<u64>]) -> Place {
    Place { name, ports: &[], memory, msrs: &[], virtio: None }
}

const fn on_virtio(name: &'static str, number: u64, queues: u64) -> Place {
    Place { virtio: Some((number, queues)), ..in_memory(name, &[]) }
}

/// The devices.
pub const DEVICES: [Place; 19] = [
    at_ports("pic", &[0x20..=0x21, 0xa0..=0xa1, 0x4d0..=0x4d1]),
    at_ports("pit", &[0x40..=0x43, 0x61..=0x61]),
    at_ports("keyboard", &[0x60..=0x60, 0x64..=0x64, 0x92..=0x92]),
    at_ports("cmos", &[0x70..=0x71]),
    at_ports("ide", &[0x1f0..=0x1f7, 0x3f6..=0x3f6, 0x170..=0x177, 0x376..=0x376, 0xc000..=0xc00f]),
    Place { memory: &[0xa_0000..=0xb_ffff], ..at_ports("vga", &[0x3b0..=0x3df]) },
    at_ports("serial", &[0x3f8..=0x3ff]),
    at_ports("fw-cfg", &[0x510..=0x511]),
    at_ports("pm", &[0x600..=0x60f]),
    Place { memory: &[0xfe00_0000..=0xfe03_ffff], ..at_ports("pci", &[0xcf8..=0xcff]) },
    Place { memory: &[0xff00_0000..=0xff00_ffff], ..at_ports("testdev", &[0xe0..=0xe9, 0xf4..=0xf4, 0x2000..=0x2020]) },
    Place { msrs: &[0x1b..=0x1b, 0x6e0..=0x6e0, 0x800..=0x83f], ..in_memory("lapic", &[0xfee0_0000..=0xfee0_03ff]) },
    in_memory("ioapic", &[0xfec0_0000..=0xfec0_0043]),
    in_memory("rom", &[0xffff_0000..=0xffff_ffff, 0xf_0000..=0xf_ffff]),
    on_virtio("virtio-block", 0, 1),
    on_virtio("virtio-net", 1, 2),
    on_virtio("virtio-console", 2, 2),
    on_virtio("virtio-rng", 3, 1),
    on_virtio("virtio-balloon", 4, 2),
];

/// A network that has a frame now and then.
struct Cable(Random);

impl Wire for Cable {
    fn send(&mut self, _frame: &[u8]) {}

    fn receive(&mut self) -> Option<Vec<u8>> {
        let len = self.0.one_of(&[0, 1, 14, 60, 1514, 9000]);
        (!self.0.once_in(4)).then(|| vec![7; len])
    }
}

/// See [`super::target`].
pub struct Devices {
    place: &'static Place,
    image: PathBuf,
}

impl Devices {
    /// Of the device of this name, if it is one.
    ///
    /// # Errors
    /// There is no room for a disk's image.
    pub fn new(name: &str) -> Option<Result<Devices, String>> {
        let place = DEVICES.iter().find(|d| d.name == name)?;
        let image = std::env::temp_dir().join(format!("bivisor-fuzz-{}-{name}.img", std::process::id()));
        let written = std::fs::write(&image, vec![0x5a; 64 << 10]).map_err(|e| format!("{}: {e}", image.display()));
        Some(written.map(|()| Devices { place, image }))
    }

    fn disk(&self, read_only: bool) -> Result<Arc<Mutex<Disk>>, String> {
        let options = Options { read_only, snapshot: !read_only, ..Options::default() };
        Ok(Arc::new(Mutex::new(Disk::open(&self.image, options)?)))
    }

    fn board(&self, r: &mut Random) -> Result<Board, String> {
        let devices: Vec<Box<dyn virtio::Device>> = vec![
            Box::new(Block::new(self.disk(r.once_in(4))?, "fuzz")),
            Box::new(Net::new([2; 6], Box::new(Cable(Random::new(r.next()))))),
            Box::new(Console::new(Box::new(std::io::sink()))),
            Box::new(Rng::new(Box::new(std::io::repeat(0x77)))),
            Box::new(Balloon::new(Arc::default())),
        ];
        let hard = |disk| Some((Kind::Disk, disk));
        let config = Config {
            epoch: 1_700_000_000,
            rom: vec![0xf4; 0x1_0000],
            virtio: devices,
            ide: [hard(self.disk(false)?), None, Some((Kind::Cd, self.disk(true)?)), hard(self.disk(true)?)],
            firmware_files: vec![("genroms/fuzz".into(), vec![0x55; 700])],
            ..Config::for_tests(RAM)
        };
        let mut machine = Machine::new(Box::<Interpreter>::default(), config)?;
        if !r.once_in(4) {
            machine.leave_firmware();
        }
        let (pc, remote) = (machine.board(), machine.remote());
        Ok(Board { machine, pc, remote, place: self.place })
    }
}

impl Drop for Devices {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.image);
    }
}

impl Target for Devices {
    fn one(&mut self, r: &mut Random) -> Result<(), String> {
        let started = Instant::now();
        quietly(|| {
            let mut board = self.board(r)?;
            if !r.once_in(8) {
                board.start_driver(r);
            }
            for _ in 0..r.below(300) {
                board.act(r);
            }
            Ok::<_, String>(())
        })??;
        let took = started.elapsed();
        if took > PATIENCE { Err(format!("{} took {:.1} s", self.place.name, took.as_secs_f64())) } else { Ok(()) }
    }
}

struct Board {
    machine: Machine,
    pc: Arc<Pc>,
    remote: Remote,
    place: &'static Place,
}

/// Numbers that devices may take for something.
fn value(r: &mut Random) -> u64 {
    match r.below(8) {
        0 | 1 => r.below(0x20),
        2 => r.below(0x100),
        3 => r.below(RAM + 0x40),
        4 => RINGS + r.below(3 * PER_QUEUE),
        5 => (BUFFERS + r.below(0x2000)) & !3,
        _ => r.edgy(),
    }
}

fn inside(r: &mut Random, range: &RangeInclusive<u64>) -> u64 {
    range.start() + r.below(range.end() - range.start() + 1)
}

impl Board {
    fn write(&self, at: u64, width: usize, v: u64) {
        self.pc.write_mmio(at, &v.to_le_bytes()[..width]);
    }

    fn out(&self, port: u16, width: usize, v: u64) {
        self.pc.write_port(port, &v.to_le_bytes()[..width]);
    }

    fn put(&self, at: u64, bytes: &[u8]) {
        let _ = self.machine.memory().write(at, bytes);
    }

    /// The initialisation of virtio 1.2, 3.1.1, with rings that name anything.
    fn start_driver(&mut self, r: &mut Random) {
        let Some((number, queues)) = self.place.virtio else { return };
        let base = VIRTIO.0 + number * VIRTIO.1;
        // Its memory and its DMA are on.
        self.out(0xcf8, 4, 1 << 31 | (FIRST_VIRTIO + number) << 11 | 4);
        self.out(0xcfc, 2, 6);
        let features = 1 << 32 | if r.once_in(6) { r.edgy() } else { 0 };
        for status in [0, 1, 3] {
            self.write(base + 0x14, 1, status);
        }
        for half in 0..2 {
            self.write(base + 8, 4, half);
            self.write(base + 0xc, 4, features >> (32 * half));
        }
        self.write(base + 0x14, 1, 0xb);
        for n in 0..queues {
            let at = RINGS + n * PER_QUEUE;
            self.write(base + 0x16, 2, n);
            self.write(base + 0x18, 2, ENTRIES);
            for (register, place) in [(0x20, at), (0x28, at + 0x400), (0x30, at + 0x800)] {
                self.write(base + register, 8, if r.once_in(20) { value(r) } else { place });
            }
            self.write(base + 0x1c, 2, 1);
        }
        self.write(base + 0x14, 1, 0xf);
        self.fill_rings(r);
    }

    /// Descriptors that are nearly right, and an available ring that names some.
    fn fill_rings(&self, r: &mut Random) {
        let Some((number, queues)) = self.place.virtio else { return };
        for n in 0..queues {
            let at = RINGS + n * PER_QUEUE;
            // Requests of three parts: read, read and written, or written by the device; one thing in so many is anything.
            let (kind, odd) = (r.below(3), r.one_of(&[10, 100, 10_000]));
            for d in 0..ENTRIES {
                let part = (d % 3) as usize;
                let (len, flags) = match kind {
                    0 => ([16, 512, 1][part], [1, 1 | (r.below(2) as u16) << 1, 2][part]),
                    1 => ([12, 60, 100][part], [1, 1, 0][part]),
                    _ => ([2000, 64, 4096][part], [3, 3, 2][part]),
                };
                let buffer = if r.once_in(odd) { value(r) } else { BUFFERS + 0x1000 * d };
                let len = if r.once_in(odd) { r.edgy() as u32 } else { len };
                let flags = if r.once_in(odd) { r.below(8) as u16 } else { flags };
                let next = if r.once_in(odd) { r.edgy() as u16 } else { (d + 1) as u16 };
                let fields = [&buffer.to_le_bytes()[..], &len.to_le_bytes(), &flags.to_le_bytes(), &next.to_le_bytes()];
                self.put(at + 16 * d, &fields.concat());
                // What a block device takes for a request's head.
                let head = [r.below(14) as u32, 0, if r.once_in(3) { r.edgy() as u32 } else { r.below(128) as u32 }, 0];
                self.put(BUFFERS + 0x1000 * d, &head.map(u32::to_le_bytes).concat());
            }
            for entry in 0..ENTRIES {
                let head = if r.once_in(odd) { r.edgy() as u16 } else { 3 * r.below(ENTRIES / 3) as u16 };
                self.put(at + 0x404 + 2 * entry, &head.to_le_bytes());
            }
            let index = if r.once_in(odd) { r.edgy() as u16 } else { r.below(ENTRIES) as u16 };
            self.put(at + 0x402, &index.to_le_bytes());
            self.write(VIRTIO.0 + number * VIRTIO.1 + 0x3000 + 4 * n, 2, n);
        }
    }

    /// A drive's command with its registers, its data or packet, and perhaps the bus master.
    fn command_a_drive(&self, r: &mut Random) {
        const COMMANDS: [u64; 24] = [
            0x00, 0x08, 0x10, 0x20, 0x24, 0x25, 0x29, 0x30, 0x34, 0x35, 0x39, 0x40, 0x90, 0x91, 0xa0, 0xa1, 0xc4, 0xc5,
            0xc6, 0xc8, 0xca, 0xe7, 0xec, 0xef,
        ];
        const PACKETS: [u64; 14] = [0, 3, 0x12, 0x1b, 0x1e, 0x25, 0x28, 0x43, 0x46, 0x4a, 0x51, 0x5a, 0xa8, 0xbe];
        let (base, master) = r.one_of(&[(0x1f0, 0xc000), (0x170, 0xc008)]);
        self.out(base + 6, 1, r.one_of(&[0xe0, 0xf0, 0xa0, 0xb0]) | r.below(16));
        for register in [2, 2, 3, 3, 4, 4, 5, 5] {
            let v = if r.once_in(4) { r.edgy() } else { r.below(4) };
            self.out(base + register, 1, v);
        }
        if r.once_in(2) {
            // A table whose entries are anything.
            for n in 0..4 {
                let entry = [value(r) as u32, if r.once_in(2) { r.edgy() as u32 } else { 0x8000_0200 }];
                self.put(BUFFERS + 8 * n, &entry.map(u32::to_le_bytes).concat());
            }
            self.out(master + 4, 4, if r.once_in(8) { value(r) } else { BUFFERS });
            self.out(master, 1, r.below(16));
        }
        let command = if r.once_in(8) { r.below(256) } else { r.one_of(&COMMANDS) };
        self.out(base + 7, 1, command);
        if command == 0xa0 {
            let mut packet: Vec<u64> = (0..12).map(|_| if r.once_in(3) { r.edgy() } else { r.below(3) }).collect();
            packet[0] = r.one_of(&PACKETS);
            packet.chunks(2).for_each(|p| self.out(base, 2, p[0] & 0xff | p[1] << 8));
        }
        for _ in 0..r.below(600) {
            if r.once_in(2) {
                self.pc.read_port(base, &mut [0; 4][..r.one_of(&[2, 4])]);
            } else {
                self.out(base, 2, r.edgy());
            }
        }
    }

    /// What a guest can do, or what can happen to it.
    fn act(&mut self, r: &mut Random) {
        let mut b = [0; 8];
        match r.below(20) {
            0 => self.put(r.below(RAM), &value(r).to_le_bytes()),
            1 => self.remote.pass_time(if r.once_in(8) { r.edgy() >> 20 } else { r.below(2_000_000) }),
            2 => {
                let _ = (self.pc.interrupt_pending(), self.pc.nmi_pending());
                let _ = (self.pc.take_interrupt(), self.pc.take_nmi());
            }
            3 => {
                let bytes = &value(r).to_le_bytes()[..r.below(9) as usize];
                match r.below(4) {
                    0 => self.remote.type_serial(bytes),
                    1 => self.remote.press_keys(bytes),
                    2 => self.remote.type_console(bytes),
                    _ => self.remote.frames_arrived(),
                }
            }
            4 => {
                self.pc.set_task_priority(r.below(16) as u8);
                let _ = (self.pc.task_priority(), self.pc.time_stamp(), self.remote.screen());
            }
            5 if self.place.virtio.is_some() => self.fill_rings(r),
            5 if self.place.name == "ide" => self.command_a_drive(r),
            6 => {
                let port = r.next() as u16;
                self.out(port, r.one_of(&[1, 2, 4]), value(r));
                self.pc.read_port(port, &mut b[..r.one_of(&[1, 2, 4])]);
            }
            _ => self.access(r),
        }
    }

    /// An access to the device itself.
    fn access(&self, r: &mut Random) {
        let mut b = [0; 8];
        let (write, v) = (r.below(3) != 0, value(r));
        let own = self.place.virtio.map(|(number, _)| {
            let parts = [0..=0x38, 0..=0x38, 0x1000..=0x1004, 0x2000..=0x2040, 0x3000..=0x3010, 0x4000..=0x4840];
            let part = &parts[r.below(parts.len() as u64) as usize];
            VIRTIO.0 + number * VIRTIO.1 + inside(r, part)
        });
        let kinds = [!self.place.ports.is_empty(), own.is_some() || !self.place.memory.is_empty()];
        let kind = match kinds {
            _ if !self.place.msrs.is_empty() && r.once_in(2) => 2,
            [true, true] => r.below(2),
            [ports, _] => u64::from(!ports),
        };
        match kind {
            0 => {
                let ports = &self.place.ports[r.below(self.place.ports.len() as u64) as usize];
                let port = inside(r, &(u64::from(*ports.start())..=u64::from(*ports.end()))) as u16;
                let width = if r.once_in(3) { r.one_of(&[2, 4]) } else { 1 };
                // PCI's address is of a function that is there, mostly.
                let v = if port == 0xcf8 { 1 << 31 | r.below(0xa) << 11 | r.below(0x100) } else { v };
                let width = if port == 0xcf8 { 4 } else { width };
                if write { self.out(port, width, v) } else { self.pc.read_port(port, &mut b[..width]) }
            }
            1 => {
                let at = own.unwrap_or_else(|| {
                    let range = &self.place.memory[r.below(self.place.memory.len() as u64) as usize];
                    inside(r, range)
                });
                let (at, width) = if r.once_in(4) { (at, r.one_of(&[1, 2, 4, 8])) } else { (at & !3, 4) };
                if write { self.write(at, width, v) } else { self.pc.read_mmio(at, &mut b[..width]) }
            }
            _ => {
                let msrs = &self.place.msrs[r.below(self.place.msrs.len() as u64) as usize];
                let index = inside(r, &(u64::from(*msrs.start())..=u64::from(*msrs.end()))) as u32;
                // The processor lets only these bits through.
                let v = if index == 0x1b { v & 0xf_ffff_fd00 } else { v };
                if write {
                    let _ = self.pc.write_msr(index, v);
                } else {
                    let _ = self.pc.read_msr(index);
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What is put into the rings is met by the devices: they give some of it back.
    #[test]
    fn the_rings_are_read() {
        for (name, queues) in DEVICES.iter().filter_map(|d| d.virtio.map(|(_, queues)| (d.name, queues))) {
            let devices = Devices::new(name).expect("a device").expect("an image");
            let given_back = (0..40).filter(|seed| {
                let mut r = Random::new(*seed);
                let mut board = devices.board(&mut r).expect("a board");
                board.start_driver(&mut r);
                (0..queues).any(|queue| {
                    let mut used = [0; 2];
                    board.machine.memory().read(RINGS + queue * PER_QUEUE + 0x802, &mut used).expect("RAM");
                    used != [0; 2]
                })
            });
            assert!(given_back.count() > 4, "{name}");
        }
    }
}
