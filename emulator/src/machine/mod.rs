//! A PC: an engine, its RAM, its board, and the loop that runs them until the machine is off.

mod acpi;
pub mod boot;
pub mod clock;
mod ide;
mod pc;
mod screen;
mod sink;

use crate::bus::Ns;
use crate::cpu::{CpuState, Rflags};
use crate::devices::fw_cfg::key;
use crate::devices::testdev::TestDevice;
use crate::devices::virtio;
use crate::devices::virtio::pci::VirtioPci;
use crate::mem::{GuestMemory, Ram};
use crate::vcpu::{Board, Cost, Exit, Vcpu};
use clock::Clock;
use ide::Ide;
pub use ide::IdeDrive;
use pc::Chips;
pub use pc::{Pc, RAM_END, Traffic};
pub use screen::Screen;
pub use sink::Sink;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};
use virtio_bindings::virtio_ids::{VIRTIO_ID_CONSOLE, VIRTIO_ID_NET};

/// The longest the timer thread sleeps: waiting output is passed on at least so often.
const NAP: Duration = Duration::from_millis(50);
/// The shortest sleep for a timer: a guest cannot keep the host busy with it.
const SHORTEST: Ns = 20_000;
/// Instructions between two looks at counted time, and what one of them takes.
const QUANTUM: u64 = 20_000;
const INSTRUCTION: Ns = 1;

/// The most RAM: a table of 1/1024 of it is the host's cost.
const MOST_MEMORY: u64 = 64 << 30;

/// The most virtio devices.
const MOST_VIRTIO: usize = 24;

/// Why the machine stopped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum End {
    /// The guest turned it off.
    PowerOff,
    /// The guest wrote to the debug-exit port: the exit status.
    DebugExit(u8),
    /// The guest asked for a reset.
    Reset,
    /// Triple fault.
    Shutdown,
    /// The time is up.
    Timeout,
    /// The user ended it.
    Quit,
    /// The engine cannot do the instruction at RIP.
    Unsupported,
}

/// What a machine is made of.
pub struct Config {
    /// Bytes of RAM; what does not fit below [`RAM_END`] is from 4 GiB on.
    pub memory: u64,
    /// Seconds since 1970 that the clock shows at the start.
    pub epoch: i64,
    /// Time is counted from instructions and is the same in every run.
    pub counted_time: bool,
    /// Where the serial port's bytes go.
    pub serial: Sink,
    /// Ports that write raw bytes somewhere.
    pub debugcon: Vec<(u16, Sink)>,
    /// The port that ends the machine with an exit status.
    pub debug_exit: Option<u16>,
    /// QEMU's pc-testdev.
    pub test_device: bool,
    /// The BIOS image that ends at 4 GiB; empty: none.
    pub rom: Vec<u8>,
    /// Virtio devices, in the order in which they are on PCI.
    pub virtio: Vec<Box<dyn virtio::Device>>,
    /// Drives as first and second of the first IDE channel, then of the second. None at all: no controller.
    pub ide: [Option<IdeDrive>; 4],
    /// Files that firmware is offered by fw_cfg: name and content. SeaBIOS runs those under `vgaroms/` and `genroms/` as option ROMs.
    pub firmware_files: Vec<(String, Vec<u8>)>,
}

impl Config {
    /// So much RAM and the chips, nothing connected; time is counted.
    pub fn bare(memory: u64) -> Config {
        Config {
            memory,
            epoch: 0,
            counted_time: true,
            serial: Sink::none(),
            debugcon: Vec::new(),
            debug_exit: None,
            test_device: false,
            rom: Vec::new(),
            virtio: Vec::new(),
            ide: Default::default(),
            firmware_files: Vec::new(),
        }
    }

    /// The same with QEMU's devices for tests: the port 0xe9, isa-debug-exit at 0xf4, pc-testdev.
    pub fn for_tests(memory: u64) -> Config {
        let debugcon = vec![(0xe9, Sink::none())];
        Config { debugcon, debug_exit: Some(0xf4), test_device: true, ..Config::bare(memory) }
    }
}

/// The machine.
pub struct Machine {
    vcpu: Box<dyn Vcpu + Send>,
    mem: Arc<GuestMemory>,
    pc: Arc<Pc>,
    off: Arc<AtomicBool>,
    instructions: u64,
    slept: Duration,
}

/// The way to a running machine from other threads.
#[derive(Clone)]
pub struct Remote {
    pc: Arc<Pc>,
}

impl Remote {
    /// Bytes for the serial port's receiver.
    pub fn type_serial(&self, bytes: &[u8]) {
        let now = self.pc.clock.now();
        let mut chips = self.pc.lock();
        chips.typed.extend(bytes);
        chips.advance(now);
        self.pc.publish_from_outside(&mut chips);
    }

    /// Scan codes (set 1) from the keyboard.
    pub fn press_keys(&self, codes: &[u8]) {
        let now = self.pc.clock.now();
        let mut chips = self.pc.lock();
        chips.keys.extend(codes);
        chips.advance(now);
        self.pc.publish_from_outside(&mut chips);
    }

    /// What is on the text screen; `None` while it is dark or shows graphics.
    pub fn screen(&self) -> Option<Screen> {
        let mode = self.pc.lock().vga.text_mode()?;
        Some(Screen::read(&self.pc.mem, mode))
    }

    /// Bytes for the virtio console, if there is one.
    pub fn type_console(&self, bytes: &[u8]) {
        let mut chips = self.pc.lock();
        chips.with_virtio(VIRTIO_ID_CONSOLE as u16, |console| console.input(bytes));
        self.pc.publish_from_outside(&mut chips);
    }

    /// The terminal behind the virtio console, if there is one, has so many columns and rows now.
    pub fn resize_console(&self, columns: u16, rows: u16) {
        let mut chips = self.pc.lock();
        chips.with_virtio(VIRTIO_ID_CONSOLE as u16, |console| console.resize(columns, rows));
        self.pc.publish_from_outside(&mut chips);
    }

    /// The network has frames for the virtio network card.
    pub fn frames_arrived(&self) {
        let mut chips = self.pc.lock();
        chips.with_virtio(VIRTIO_ID_NET as u16, |net| net.input(&[]));
        self.pc.publish_from_outside(&mut chips);
    }

    /// Lets counted time pass and carries out what is due then; the host's time passes by itself.
    pub fn pass_time(&self, by: Ns) {
        self.pc.clock.add(by);
        let now = self.pc.clock.now();
        let mut chips = self.pc.lock();
        chips.advance(now);
        self.pc.publish_from_outside(&mut chips);
    }

    /// Ends the machine.
    pub fn end(&self, why: End) {
        let mut chips = self.pc.lock();
        chips.end.get_or_insert(why);
        self.pc.publish(&mut chips);
        self.pc.wake.notify_all();
    }

    /// Presses the power button.
    pub fn press_power_button(&self) {
        let now = self.pc.clock.now();
        let mut chips = self.pc.lock();
        chips.pm.press_power_button();
        chips.advance(now);
        self.pc.publish_from_outside(&mut chips);
    }
}

impl Machine {
    /// With an engine in the state after RESET.
    ///
    /// # Errors
    /// A sentence: the host has no memory for it, or it is too much.
    pub fn new(vcpu: Box<dyn Vcpu + Send>, config: Config) -> Result<Machine, String> {
        if config.memory > MOST_MEMORY || config.memory < 1 << 20 {
            return Err(format!("a machine has 1 to {} MiB of memory", MOST_MEMORY >> 20));
        }
        let ram = match config.memory.checked_sub(RAM_END) {
            Some(above @ 1..) => Ram::with_hole(RAM_END, above),
            _ => Ram::shared(config.memory),
        };
        let ram = ram.map_err(|e| format!("no memory for the guest: {e}"))?;
        let clock = if config.counted_time { Clock::counted() } else { Clock::host() };
        let mut chips = Chips::new(config.epoch, config.serial);
        chips.debugcon = config.debugcon;
        chips.debug_exit = config.debug_exit;
        chips.test = config.test_device.then(TestDevice::default);
        chips.fw_cfg.set(key::RAM_SIZE, &config.memory.to_le_bytes());
        chips.fw_cfg.set(key::NB_CPUS, &1u16.to_le_bytes());
        chips.fw_cfg.set(key::MAX_CPUS, &1u16.to_le_bytes());
        tell_memory(&mut chips, config.memory);
        for (name, bytes) in acpi::firmware_files() {
            chips.fw_cfg.add_file(name, &bytes);
        }
        for (name, bytes) in &config.firmware_files {
            chips.fw_cfg.add_file(name, bytes);
        }
        let mem = Arc::new(GuestMemory::Ram(ram));
        put_rom(&mem, &config.rom);
        chips.rom = config.rom;
        if config.virtio.len() > MOST_VIRTIO {
            return Err(format!("a machine has at most {MOST_VIRTIO} virtio devices"));
        }
        chips.virtio = config.virtio.into_iter().map(|device| VirtioPci::new(device, mem.clone())).collect();
        if config.ide.iter().any(Option::is_some) {
            chips.ide = Some(Ide::new(&config.ide, mem.clone()));
        }
        let pc = Arc::new(Pc::new(chips, mem.clone(), clock, vcpu.kicker()));
        Ok(Machine { vcpu, mem, pc, off: Arc::default(), instructions: 0, slept: Duration::ZERO })
    }

    /// Leaves chips and low memory as a BIOS would, for kernels that are loaded without one.
    pub fn leave_firmware(&mut self) {
        boot::firmware::leave(&self.mem, &*self.pc);
        let mut chips = self.pc.lock();
        if let Some(ide) = &mut chips.ide {
            ide.place();
        }
        for (n, device) in chips.virtio.iter_mut().enumerate() {
            device.place(pc::VIRTIO_MEMORY.0 + n as u32 * pc::VIRTIO_MEMORY.1, pc::PCI_IRQS[n % pc::PCI_IRQS.len()]);
        }
    }

    /// The way to it from other threads.
    pub fn remote(&self) -> Remote {
        Remote { pc: self.pc.clone() }
    }

    /// The processor's registers.
    pub fn state(&mut self) -> &mut CpuState {
        self.vcpu.state()
    }

    /// The RAM.
    pub fn memory(&self) -> &GuestMemory {
        &self.mem
    }

    /// The RAM, for somebody who looks at it while the machine runs.
    pub fn shared_memory(&self) -> Arc<GuestMemory> {
        self.mem.clone()
    }

    /// RAM and registers, to put a guest into.
    pub fn guest(&mut self) -> (&GuestMemory, &mut CpuState) {
        (&self.mem, self.vcpu.state())
    }

    /// The board, as the engine sees it.
    pub fn board(&self) -> Arc<Pc> {
        self.pc.clone()
    }

    /// The engine.
    pub fn vcpu(&mut self) -> &mut (dyn Vcpu + 'static) {
        &mut *self.vcpu
    }

    /// What the processor had the chips do.
    pub fn traffic(&self) -> Traffic {
        self.pc.lock().traffic
    }

    /// System-management interrupts that the guest sent itself, for nothing.
    pub fn ignored_smis(&self) -> u64 {
        self.pc.lock().lapic.ignored_smis()
    }

    /// From now on measures what is costly to measure: for statistics.
    pub fn measure(&mut self) {
        self.vcpu.measure();
        self.pc.lock().watch.start();
    }

    /// What the chips' part of the processor's accesses cost since [`Machine::measure`], by kind of access.
    pub fn costs(&self) -> Vec<Cost> {
        self.pc.lock().watch.costs()
    }

    /// Host time that the processor's thread slept because the guest had halted; `None`: the engine sees to interrupts itself, and does not tell.
    pub fn slept(&self) -> Option<Duration> {
        self.pc.lock().controllers.is_none().then_some(self.slept)
    }

    /// The machine's time.
    pub fn time(&self) -> Duration {
        Duration::from_nanos(self.pc.clock.now())
    }

    /// Runs until the machine stops, at most `limit` of the machine's time.
    pub fn run(&mut self, limit: Option<Duration>) -> End {
        let limit = limit.map(|l| l.as_nanos() as Ns);
        let counted = self.pc.clock.is_counted();
        let timer = (!counted).then(|| {
            let (pc, off) = (self.pc.clone(), self.off.clone());
            std::thread::spawn(move || keep_time(&pc, &off, limit))
        });
        let end = if counted { self.run_counted(limit) } else { self.run_freely() };
        self.off.store(true, Ordering::Relaxed);
        self.pc.rearm.notify_all();
        if let Some(timer) = timer {
            let _ = timer.join();
        }
        let mut chips = self.pc.lock();
        chips.serial.flush();
        chips.debugcon.iter_mut().for_each(|(_, sink)| sink.flush());
        end
    }

    fn run_freely(&mut self) -> End {
        loop {
            let exit = self.vcpu.run(Board { mem: &self.mem, bus: &*self.pc }, u64::MAX);
            if let Some(end) = self.pc.lock().end.take() {
                return end;
            }
            match exit {
                Exit::Halt => {
                    let began = Instant::now();
                    self.sleep();
                    self.slept += began.elapsed();
                }
                exit => {
                    if let Some(end) = ended(exit) {
                        return end;
                    }
                }
            }
        }
    }

    /// Sleeps until there is something for the processor to do.
    fn sleep(&mut self) {
        let interrupts_on = self.vcpu.integer_state().rflags.contains(Rflags::IF);
        let mut chips = self.pc.lock();
        chips.serial.flush();
        chips.halted = true;
        loop {
            let now = self.pc.clock.now();
            chips.advance(now);
            self.pc.publish(&mut chips);
            if self.pc.is_waiting(interrupts_on) || chips.end.is_some() {
                break;
            }
            let nap = chips.next(now).map(|at| Duration::from_nanos(at.saturating_sub(now).max(SHORTEST)));
            let nap = nap.unwrap_or(NAP).min(NAP);
            chips = self.pc.wake.wait_timeout(chips, nap).unwrap_or_else(std::sync::PoisonError::into_inner).0;
        }
        chips.halted = false;
        let now = self.pc.clock.now();
        if chips.next(now).is_some_and(|at| at < chips.armed) {
            self.pc.rearm.notify_one();
        }
    }

    /// As [`Machine::run_freely`], with time that only instructions and looks at the clock move.
    fn run_counted(&mut self, limit: Option<Ns>) -> End {
        loop {
            let round = self.begin_round();
            let (exit, done) = self.run_part(round.budget);
            if let Some(end) = self.end_round(&round, exit, done, limit) {
                return end;
            }
        }
    }

    /// With counted time: carries out what is due, and says how many instructions come before the next look at the clock. For callers
    /// that run them in parts, as a comparison of two machines does.
    pub fn begin_round(&mut self) -> Round {
        let now = self.pc.clock.now();
        let mut chips = self.pc.lock();
        chips.advance(now);
        self.pc.publish(&mut chips);
        let next = chips.next(now).unwrap_or(u64::MAX);
        Round { now, budget: (next.saturating_sub(now) / INSTRUCTION).clamp(1, QUANTUM) }
    }

    /// Runs a part of a round: at most `budget` instructions; how many it was. Time does not pass yet.
    pub fn run_part(&mut self, budget: u64) -> (Exit, u64) {
        let before = self.vcpu.instructions().unwrap_or(0);
        let exit = self.vcpu.run(Board { mem: &self.mem, bus: &*self.pc }, budget);
        // An engine that does not count has done what it was told.
        (exit, self.vcpu.instructions().map_or(budget, |n| n - before))
    }

    /// After `done` instructions, of which the last part came back with `exit`: lets time pass, if the processor halts as long as it
    /// takes. `Some` if the machine stops.
    pub fn end_round(&mut self, round: &Round, exit: Exit, done: u64, limit: Option<Ns>) -> Option<End> {
        self.instructions += done;
        self.pc.clock.add(done * INSTRUCTION);
        if let Some(end) = self.pc.lock().end.take().or_else(|| ended(exit)) {
            return Some(end);
        }
        let interrupts_on = self.vcpu.integer_state().rflags.contains(Rflags::IF);
        // A halted processor waits for the next event, however long that takes.
        let mut now = round.now;
        while exit == Exit::Halt && !self.pc.is_waiting(interrupts_on) && limit.is_none_or(|limit| now < limit) {
            now = self.pc.clock.now();
            let mut chips = self.pc.lock();
            let next = chips.next(now).unwrap_or(now + NAP.as_nanos() as Ns);
            self.pc.clock.add(next.saturating_sub(now));
            chips.advance(next);
            self.pc.publish(&mut chips);
            if let Some(end) = chips.end.take() {
                return Some(end);
            }
        }
        limit.is_some_and(|limit| now >= limit).then_some(End::Timeout)
    }
}

/// Instructions between two looks at counted time.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Round {
    now: Ns,
    /// How many, at most.
    pub budget: u64,
}

/// Does this exit end the machine?
fn ended(exit: Exit) -> Option<End> {
    match exit {
        Exit::Shutdown => Some(End::Shutdown),
        Exit::Unsupported | Exit::Exception(_) | Exit::Intercept { .. } => Some(End::Unsupported),
        // Only processes have their calls made by the engine.
        Exit::Halt | Exit::Budget | Exit::Kicked | Exit::Made { .. } => None,
    }
}

/// The timer thread: advances the chips when something is due, and ends the machine when its time is up.
fn keep_time(pc: &Pc, off: &AtomicBool, limit: Option<Ns>) {
    let mut chips = pc.lock();
    while !off.load(Ordering::Relaxed) {
        let now = pc.clock.now();
        if limit.is_some_and(|limit| now >= limit) {
            chips.end.get_or_insert(End::Timeout);
            pc.publish(&mut chips);
            pc.wake.notify_all();
        }
        let mut nap = NAP.as_nanos() as Ns;
        if !chips.halted {
            chips.advance(now);
            pc.publish_from_outside(&mut chips);
            if let Some(at) = chips.next(now) {
                nap = nap.min(at.saturating_sub(now).max(SHORTEST));
            }
        }
        chips.serial.flush();
        if let Some(limit) = limit.filter(|l| *l > now) {
            nap = nap.min(limit - now + 1);
        }
        chips.armed = now + nap;
        let slept = pc.rearm.wait_timeout(chips, Duration::from_nanos(nap));
        chips = slept.unwrap_or_else(std::sync::PoisonError::into_inner).0;
    }
}

/// A BIOS is below 1 MiB too: at most its last 128 KiB, for option ROMs are before that.
fn put_rom(mem: &GuestMemory, rom: &[u8]) {
    let low = &rom[rom.len() - rom.len().min(0x2_0000)..];
    let _ = mem.write(0x10_0000 - low.len() as u64, low);
}

/// Sizes of memory as BIOSes read them from the CMOS.
fn tell_memory(chips: &mut Chips, memory: u64) {
    let mut word = |at: u8, v: u64| {
        chips.cmos.set(at, v as u8);
        chips.cmos.set(at + 1, (v >> 8) as u8);
    };
    word(0x15, 640);
    let extended = (memory >> 10).saturating_sub(1024).min(0xffff);
    word(0x17, extended);
    word(0x30, extended);
    let low = memory.min(RAM_END);
    word(0x34, low.saturating_sub(16 << 20) >> 16);
    // Above 4 GiB, in units of 64 KiB: three bytes (QEMU, SeaBIOS).
    let above = (memory - low) >> 16;
    word(0x5b, above);
    chips.cmos.set(0x5d, (above >> 16) as u8);
}
