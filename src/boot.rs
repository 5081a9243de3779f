//! `bivisor boot`: a whole machine under an engine, with its console on the terminal.

use crate::display::Display;
use crate::drive::{Drive, Drives};
use crate::ending::Ending;
use crate::engine::{self, Backend, Purpose};
use crate::exec::response;
use crate::machine_stats;
use crate::net;
use crate::pty::Pty;
use crate::stats::Format;
use crate::terminal::{self, Input, Terminal};
use anyhow::{Context, Result, anyhow, bail};
use bivisor_emulator::cpu::CpuState;
use bivisor_emulator::cpu::cpuid::CpuModel;
use bivisor_emulator::devices::disk::Disk;
use bivisor_emulator::devices::virtio;
use bivisor_emulator::devices::virtio::balloon::{self, Balloon};
use bivisor_emulator::devices::virtio::block::Block;
use bivisor_emulator::devices::virtio::console::Console;
use bivisor_emulator::devices::virtio::net::{Net, Wire};
use bivisor_emulator::devices::virtio::rng::Rng;
use bivisor_emulator::machine::boot::{self, Payload};
use bivisor_emulator::machine::{Config, End, Machine, Sink};
use bivisor_kvm_backend::KvmVcpu;
use clap::{ArgGroup, Args, ValueEnum};
use std::fs::File;
use std::io::{IsTerminal, Write};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

/// Exit statuses that no guest gives by the debug-exit port, whose statuses are odd, or that mean the same.
const TRIPLE_FAULT: i32 = 122;
const TIMEOUT: i32 = 124;
const UNSUPPORTED: i32 = 125;

/// Arguments of `bivisor boot`.
#[derive(Args)]
#[command(group = ArgGroup::new("start").args(["kernel", "bios", "flat", "drive", "cdrom"]).required(true).multiple(true))]
#[command(after_help = "Examples:\n  \
        bivisor boot --kernel vmlinuz --initrd initrd.img --append 'console=ttyS0' --memory 512\n  \
        bivisor boot --cdrom debian.iso --memory 1G\n  \
        bivisor boot --kernel tests/smap.flat --cpu max --testdev --debug-exit 0xf4 --timeout 60\n\n\
        Exit status: 0 when the guest turns the machine off or the user quits; ((v << 1) | 1) & 0xff when it writes v to the\n\
        --debug-exit port; 122 after a triple fault, 124 when the time is up, 125 when the engine cannot do an instruction;\n\
        1 if the machine cannot be started.\n\n\
        On a terminal, Ctrl-A x quits and Ctrl-A h shows the other keys.")]
pub struct BootArgs {
    /// The kernel: bzImage, vmlinux, PVH or multiboot; its kind is found out.
    #[arg(long, value_name = "FILE", conflicts_with_all = ["bios", "flat"])]
    kernel: Option<PathBuf>,
    /// A BIOS image of 64, 128 or 256 KiB, which gets the machine as after RESET [default without --kernel and --flat: SeaBIOS as
    /// distributions install it].
    #[arg(long, value_name = "FILE", conflicts_with = "flat")]
    bios: Option<PathBuf>,
    /// The VGA's BIOS: an option ROM that SeaBIOS runs first [default: vgabios-isavga.bin beside the BIOS, if it is there].
    #[arg(long, value_name = "FILE", conflicts_with_all = ["kernel", "flat"])]
    vgabios: Option<PathBuf>,
    /// Another option ROM for the BIOS to run. May be repeated.
    #[arg(long, value_name = "FILE", conflicts_with_all = ["kernel", "flat"])]
    option_rom: Vec<PathBuf>,
    /// Bytes to put at an address and to start there, in --mode: code.bin@0x7c00.
    #[arg(long, value_name = "FILE@ADDRESS")]
    flat: Option<String>,
    /// How --flat starts.
    #[arg(long, value_enum, default_value = "real", requires = "flat")]
    mode: FlatMode,
    /// Let a bzImage unpack itself in the guest, to an address of chance (KASLR), as on a PC. Otherwise what gzip, xz or LZ4 packed is
    /// unpacked here, where the kernel was linked for, which is faster.
    #[arg(long, requires = "kernel")]
    no_unpack: bool,
    /// The initial RAM disk, or the first multiboot module.
    #[arg(long, value_name = "FILE")]
    initrd: Option<PathBuf>,
    /// A disk, in QEMU's words: file=PATH and, after commas, format=raw or qcow2, if=virtio or ide, readonly=on, snapshot=on, cache=unsafe. The
    /// first on virtio is the guest's /dev/vda. With snapshot=on what the guest writes is kept in memory. May be repeated.
    #[arg(long, value_name = "file=PATH,...", value_parser = Drive::parse)]
    drive: Vec<Drive>,
    /// A virtio console, the guest's /dev/hvc0: stdio (and --serial none), or file:PATH.
    #[arg(long, value_name = "WHERE")]
    virtio_console: Option<String>,
    /// A virtio network card: user, a network of its own behind the host's sockets (10.0.2.0/24, DHCP; the host is 10.0.2.2), or none.
    #[arg(long, value_name = "KIND", value_parser = network, default_value = "none")]
    net: Network,
    /// A virtio entropy device, from the host's generator; with --deterministic, bytes that repeat.
    #[arg(long)]
    rng: bool,
    /// A virtio balloon that asks the guest to give this much memory back to the host: MiB, or with a unit.
    #[arg(long, value_name = "SIZE", value_parser = memory)]
    balloon: Option<u64>,
    /// A CD: an ISO image in a drive on the second IDE channel.
    #[arg(long, value_name = "FILE")]
    cdrom: Option<PathBuf>,
    /// The kernel's command line.
    #[arg(long, value_name = "TEXT", default_value = "", allow_hyphen_values = true)]
    append: String,
    /// RAM in MiB, or with a unit: 512, 512M, 2G; up to 64G. What does not fit below 3 GiB is from 4 GiB on.
    #[arg(short, long, value_name = "SIZE", default_value = "512", value_parser = memory)]
    memory: u64,
    /// Processors: 1.
    #[arg(long, value_name = "N", default_value_t = 1)]
    smp: u32,
    /// The offered CPU: host, max, x86-64-v1 to x86-64-v4; features more or less after it: max,-pcid,+rdseed.
    #[arg(long, value_name = "MODEL", default_value = "host")]
    cpu: String,
    /// The engine.
    #[arg(long, value_enum, default_value = "auto")]
    backend: Backend,
    /// KVM only: are interrupt controllers those of the kernel, or the board's? [default: on, but off for a software KVM, where the
    /// interpreter does some instructions and has to reach them]
    #[arg(long, value_enum, value_name = "SWITCH")]
    kernel_irqchip: Option<Switch>,
    /// The first serial port: stdio, none, file:PATH, or pty, a new pseudoterminal whose name is said at the start [default: stdio, or none with --display text].
    #[arg(long, value_name = "WHERE")]
    serial: Option<String>,
    /// The VGA's text screen: drawn in the terminal, where what is typed then goes to the PC's keyboard; if standard output is no
    /// terminal, the rows that change are printed. [default: text for --bios on a terminal without --serial, else none]
    #[arg(long, value_enum)]
    display: Option<Screen>,
    /// A port whose bytes go to a file: 0xe9=file:PATH, or 0xe9=stdio. May be repeated.
    #[arg(long, value_name = "PORT=WHERE")]
    debugcon: Vec<String>,
    /// The port that ends the machine with an exit status.
    #[arg(long, value_name = "PORT", value_parser = port)]
    debug_exit: Option<u16>,
    /// QEMU's test device: ports 0xe0 to 0xe4 and 0x2000 and following, memory at 0xff000000.
    #[arg(long)]
    testdev: bool,
    /// End with status 0 instead of starting again when the guest resets the machine.
    #[arg(long)]
    no_reboot: bool,
    /// End with status 124 after so many seconds.
    #[arg(long, value_name = "SECONDS")]
    timeout: Option<f64>,
    /// Time from the number of instructions: the same in every run.
    #[arg(long)]
    deterministic: bool,
    /// Write the processor's state at the end, as JSON.
    #[arg(long, value_name = "FILE")]
    dump_state: Option<PathBuf>,
    /// At the end, say what the engine and the chips did: times, reasons by Intel's exit numbers, blocks.
    #[arg(long, value_enum, value_name = "FORMAT", num_args = 0..=1, require_equals = true, default_missing_value = "text")]
    stats: Option<Format>,
    /// Say which engine runs and why.
    #[arg(short, long)]
    verbose: bool,
}

fn memory(text: &str) -> Result<u64, String> {
    let (digits, shift) = match text.as_bytes().last() {
        Some(b'G' | b'g') => (&text[..text.len() - 1], 30),
        Some(b'M' | b'm') => (&text[..text.len() - 1], 20),
        _ => (text, 20),
    };
    let n: u64 = digits.parse().map_err(|_| "a number of MiB, or with the unit M or G".to_owned())?;
    n.checked_mul(1 << shift).ok_or_else(|| "too much".to_owned())
}

fn port(text: &str) -> Result<u16, String> {
    let parsed = match text.strip_prefix("0x") {
        Some(hex) => u16::from_str_radix(hex, 16),
        None => text.parse(),
    };
    parsed.map_err(|_| "a port number, 0 to 0xffff".to_owned())
}

/// The kinds of --net.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Network {
    None,
    User,
}

fn network(text: &str) -> Result<Network, String> {
    match text {
        "none" => Ok(Network::None),
        "user" => Ok(Network::User),
        _ if text.starts_with("tap") => Err("tap is not built; use user".to_owned()),
        _ => Err("user or none".to_owned()),
    }
}

/// A file given on the command line.
fn read(path: &Path, what: &str) -> Result<Vec<u8>> {
    std::fs::read(path).with_context(|| format!("{what} {}", path.display()))
}

/// `stdio`, `none`, `file:PATH`.
fn sink(option: &str, place: &str) -> Result<Sink> {
    match place.split_once(':') {
        None if place == "stdio" => Ok(Sink::new(Box::new(std::io::stdout()))),
        None if place == "none" => Ok(Sink::none()),
        Some(("file", path)) => {
            let file = File::create(path).with_context(|| format!("{option}: {path}"))?;
            Ok(Sink::new(Box::new(file)))
        }
        _ => {
            let more = if option == "--serial" { ", pty" } else { "" };
            bail!("{option}: `{place}` is none of stdio, none, file:PATH{more}")
        }
    }
}

/// Words for yes and no.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Switch {
    /// Yes.
    On,
    /// No.
    Off,
}

/// What becomes of the VGA's text screen.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Screen {
    /// It is drawn in the terminal.
    Text,
    /// It is not shown.
    None,
}

impl BootArgs {
    fn display(&self) -> Screen {
        let shown = self.has_bios() && self.serial.is_none() && std::io::stdout().is_terminal();
        self.display.unwrap_or(if shown { Screen::Text } else { Screen::None })
    }

    /// Is the virtio console on the terminal?
    fn on_console(&self) -> bool {
        self.virtio_console.as_deref() == Some("stdio")
    }

    /// Does a BIOS get the machine?
    fn has_bios(&self) -> bool {
        self.kernel.is_none() && self.flat.is_none()
    }

    /// The BIOS that is named, else one that is installed.
    fn bios(&self) -> Result<&Path> {
        const INSTALLED: [&str; 3] =
            ["/usr/share/seabios/bios-256k.bin", "/usr/share/qemu/bios-256k.bin", "/usr/share/seabios/bios.bin"];
        let installed = || INSTALLED.into_iter().map(Path::new).find(|path| path.is_file());
        self.bios.as_deref().or_else(installed).ok_or_else(|| {
            anyhow!("a disk without --kernel needs a BIOS and none is installed: install seabios or use --bios FILE")
        })
    }

    fn serial(&self) -> &str {
        let taken = self.display() == Screen::Text || self.on_console();
        let other = if taken { "none" } else { "stdio" };
        self.serial.as_deref().unwrap_or(other)
    }
}

/// The modes of --flat.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum FlatMode {
    /// Real mode, with the address as segment 0 if it fits, else as segment:0.
    Real,
    /// 32-bit protected mode, flat, without paging.
    Prot,
    /// 64-bit mode, the first 4 GiB mapped to themselves.
    Long,
}

/// What gets the machine.
enum Start {
    Kernel(Vec<u8>),
    Bios(Vec<u8>),
    Flat(Vec<u8>, u64),
}

impl Start {
    /// What an engine is wanted for.
    fn purpose(&self) -> Purpose {
        match self {
            Start::Flat(..) => Purpose::SmallMachine,
            Start::Kernel(image) => match boot::kind(image) {
                Some(boot::Kind::Multiboot | boot::Kind::Multiboot2) => Purpose::SmallMachine,
                _ => Purpose::Machine,
            },
            Start::Bios(_) => Purpose::Machine,
        }
    }
}

/// Everything that was read from files, for one start after another.
struct Inputs {
    start: Start,
    initrd: Option<Vec<u8>>,
    option_roms: Vec<(String, Vec<u8>)>,
    model: Arc<CpuModel>,
    backend: Backend,
    /// What --drive and --cdrom name, open: disks last longer than one start of the machine.
    drives: Drives,
}

/// Runs the machine; gives the exit status.
pub fn run(args: &BootArgs) -> Result<i32> {
    if args.smp != 1 {
        bail!("--smp {}: a machine has one processor", args.smp);
    }
    let model = CpuModel::from_name(&args.cpu).map_err(anyhow::Error::msg)?;
    let start = start(args)?;
    let (backend, why) = engine::choose(args.backend, start.purpose()).map_err(anyhow::Error::msg)?;
    if args.kernel_irqchip.is_some() && backend != Backend::Kvm {
        let here = backend.name();
        bail!(
            "--kernel-irqchip is about KVM's interrupt controllers, and this machine runs on {here}: leave it out, or use --backend kvm"
        );
    }
    let model = Arc::new(if backend == Backend::Kvm { model } else { model.in_software() });
    if args.verbose || backend == Backend::Kvm && !bivisor_kvm_backend::host().usable_for_machine {
        eprintln!("bivisor: {why}");
    }
    let initrd = args.initrd.as_ref().map(|path| read(path, "--initrd")).transpose()?;
    let drives = Drives::open(&args.drive, args.cdrom.as_deref())?;
    let inputs = Inputs { start, initrd, option_roms: option_roms(args)?, model, backend, drives };
    let limit = args.timeout.map(Duration::try_from_secs_f64).transpose().context("--timeout")?;
    let shown = args.display() == Screen::Text;
    if shown && args.serial() == "stdio" {
        bail!("--display text and --serial stdio both want the terminal: use --serial file:PATH or none");
    }
    if args.on_console() && (shown || args.serial() == "stdio") {
        bail!("--virtio-console stdio and --display text or --serial stdio want the same terminal");
    }
    let input = match args.serial() {
        _ if shown => Some(Input::Keyboard),
        _ if args.on_console() => Some(Input::Console),
        serial => (serial == "stdio").then_some(Input::Serial),
    };
    // Before there are other threads.
    let ending = Ending::watch();
    let terminal = input.map(Terminal::take);
    let pty = (args.serial() == "pty").then(Pty::open).transpose()?;
    if let Some(pty) = &pty {
        eprintln!("bivisor: the serial port is on {}", pty.name);
    }
    let started = Instant::now();
    loop {
        let (wire, network) = match args.net {
            Network::User => Some(net::user()?).unzip(),
            Network::None => (None, None),
        };
        let mut machine = build(args, &inputs, wire, pty.as_ref())?;
        let clocks = machine_stats::Start::now();
        if args.stats.is_some() {
            machine.measure();
        }
        if let Some(pty) = &pty {
            pty.set(Some(machine.remote()));
        }
        if let Some(network) = &network {
            network.attach(Some(machine.remote()));
        }
        if let Some(terminal) = &terminal {
            terminal.attach(machine.remote());
        }
        ending.attach(Some(machine.remote()));
        let display = shown.then(|| Display::start(machine.remote()));
        let end = machine.run(limit.map(|l| l.saturating_sub(started.elapsed())));
        drop(display);
        ending.attach(None);
        if let Some(network) = &network {
            network.attach(None);
        }
        if let Some(terminal) = &terminal {
            terminal.detach();
        }
        if let Some(pty) = &pty {
            pty.set(None);
        }
        if let Some(path) = &args.dump_state {
            dump(path, machine.state())?;
        }
        let status = match end {
            End::Reset if !args.no_reboot => continue,
            End::PowerOff | End::Quit | End::Reset => 0,
            End::DebugExit(status) => i32::from(status),
            End::Shutdown => TRIPLE_FAULT,
            End::Timeout => TIMEOUT,
            End::Unsupported => UNSUPPORTED,
        };
        drop(terminal);
        if let Some(format) = args.stats {
            eprintln!("{}", clocks.report(&mut machine, inputs.backend.name(), format));
        }
        if let n @ 1.. = machine.ignored_smis() {
            eprintln!("bivisor: {n} system-management interrupts were ignored: there is no such mode");
        }
        if let Some(words) = complaint(end) {
            let any: &dyn std::any::Any = machine.vcpu();
            let why = any.downcast_ref::<KvmVcpu>().and_then(KvmVcpu::reason).map(|why| format!(": {why}"));
            let why = why.filter(|_| end == End::Unsupported).unwrap_or_default();
            eprintln!("bivisor: {words} {}{why}", place(machine.state()));
        }
        ending.die_if_told();
        return Ok(status);
    }
}

/// Makes pairs of equal machines with counted time, on the interpreter and on the translator, whose serial ports say nothing.
pub fn pair(mut args: BootArgs) -> Result<impl FnMut() -> Result<(Machine, Machine)>> {
    args.deterministic = true;
    args.serial = Some("none".into());
    let model = Arc::new(CpuModel::from_name(&args.cpu).map_err(anyhow::Error::msg)?.in_software());
    let initrd = args.initrd.as_ref().map(|path| read(path, "--initrd")).transpose()?;
    let backend = Backend::Interp;
    if args.net != Network::None {
        bail!("--net: two machines in step cannot have a network, which is never the same twice");
    }
    let (start, option_roms, drives) = (start(&args)?, option_roms(&args)?, Drives::default());
    let mut inputs = Inputs { start, initrd, option_roms, model, backend, drives };
    Ok(move || {
        // Each machine has its own view of a disk, which readonly=on or snapshot=on give; else the second finds it in use.
        let mut machine = |backend| {
            inputs.backend = backend;
            inputs.drives = Drives::open(&args.drive, args.cdrom.as_deref())?;
            build(&args, &inputs, None, None)
        };
        Ok((machine(Backend::Interp)?, machine(Backend::Bt)?))
    })
}

fn start(args: &BootArgs) -> Result<Start> {
    if args.has_bios() {
        let path = args.bios()?;
        let rom = read(path, "--bios")?;
        if !matches!(rom.len(), 0x1_0000 | 0x2_0000 | 0x4_0000) {
            bail!("--bios {}: {} bytes; an image has 64, 128 or 256 KiB", path.display(), rom.len());
        }
        return Ok(Start::Bios(rom));
    }
    if let Some(text) = &args.flat {
        let parts = text.rsplit_once('@').and_then(|(path, at)| {
            let at = at.strip_prefix("0x").map_or_else(|| at.parse().ok(), |hex| u64::from_str_radix(hex, 16).ok());
            at.map(|at| (path, at))
        });
        let (path, at) = parts.ok_or_else(|| anyhow!("--flat {text}: FILE@ADDRESS, as in code.bin@0x7c00"))?;
        return Ok(Start::Flat(read(Path::new(path), "--flat")?, at));
    }
    let path = args.kernel.as_ref().ok_or_else(|| anyhow!("nothing to boot: use --kernel, --bios or --flat"))?;
    Ok(Start::Kernel(read(path, "--kernel")?))
}

/// The option ROMs, by the names by which SeaBIOS finds them.
fn option_roms(args: &BootArgs) -> Result<Vec<(String, Vec<u8>)>> {
    if !args.has_bios() {
        return Ok(Vec::new());
    }
    let beside = Some(args.bios()?.with_file_name("vgabios-isavga.bin")).filter(|path| path.is_file());
    let vga = args.vgabios.clone().or(beside);
    let mut roms = Vec::new();
    let others = args.option_rom.iter().map(|path| ("--option-rom", "genroms", path));
    for (option, directory, path) in vga.iter().map(|path| ("--vgabios", "vgaroms", path)).chain(others) {
        let bytes = read(path, option)?;
        if !bytes.starts_with(&[0x55, 0xaa]) {
            bail!("{option} {}: not an option ROM: it does not begin with 55 AA", path.display());
        }
        let name = path.file_name().map(|n| n.to_string_lossy()).unwrap_or_default();
        if name.len() > 40 {
            bail!("{option} {}: a name of at most 40 bytes", path.display());
        }
        roms.push((format!("{directory}/{name}"), bytes));
    }
    Ok(roms)
}

fn complaint(end: End) -> Option<&'static str> {
    match end {
        End::Shutdown => Some("the guest died of a triple fault at"),
        End::Timeout => Some("the time is up; the guest was at"),
        End::Unsupported => Some("the engine cannot go on at"),
        _ => None,
    }
}

/// Where the processor is.
fn place(s: &CpuState) -> String {
    let cs = s.seg[1].selector;
    format!(
        "{cs:04x}:{:#x} ({:?}, CPL {}), CR0 {:#x}, CR2 {:#x}, CR3 {:#x}",
        s.rip,
        s.mode(),
        s.cpl(),
        s.cr0.bits(),
        s.cr2,
        s.cr3
    )
}

/// The `n`th virtio disk.
fn virtio_disk((n, disk): (usize, &Arc<Mutex<Disk>>)) -> Box<dyn virtio::Device> {
    Box::new(Block::new(disk.clone(), &format!("bivisor-{n}")))
}

/// The devices on PCI: disks first, so that their places do not depend on the others.
fn virtio_devices(
    args: &BootArgs,
    inputs: &Inputs,
    wire: Option<Box<dyn Wire>>,
) -> Result<Vec<Box<dyn virtio::Device>>> {
    let mut devices: Vec<_> = inputs.drives.virtio.iter().enumerate().map(virtio_disk).collect();
    devices.extend(wire.map(|wire| Box::new(Net::new(net::MAC, wire)) as Box<dyn virtio::Device>));
    if let Some(place) = &args.virtio_console {
        let console = Console::new(Box::new(sink("--virtio-console", place)?));
        devices.push(Box::new(match terminal::size().filter(|_| args.on_console()) {
            Some((columns, rows)) => console.on_terminal(columns, rows),
            None => console,
        }));
    }
    if args.rng {
        let source: Box<dyn std::io::Read + Send> = match args.deterministic {
            true => Box::new(Repeating(1)),
            false => Box::new(File::open("/dev/urandom").context("--rng: /dev/urandom")?),
        };
        devices.push(Box::new(Rng::new(source)));
    }
    if let Some(bytes) = args.balloon {
        if bytes >= args.memory {
            bail!("--balloon: the guest has {} MiB and cannot give them all", args.memory >> 20);
        }
        let target = balloon::Target::default();
        target.pages.store((bytes / 4096) as u32, std::sync::atomic::Ordering::Relaxed);
        devices.push(Box::new(Balloon::new(Arc::new(target))));
    }
    Ok(devices)
}

/// Bytes that look like chance and are the same in every run (xorshift64).
struct Repeating(u64);

impl std::io::Read for Repeating {
    fn read(&mut self, to: &mut [u8]) -> std::io::Result<usize> {
        for b in to.iter_mut() {
            self.0 ^= self.0 << 13;
            self.0 ^= self.0 >> 7;
            self.0 ^= self.0 << 17;
            *b = (self.0 >> 32) as u8;
        }
        Ok(to.len())
    }
}

fn build(args: &BootArgs, inputs: &Inputs, wire: Option<Box<dyn Wire>>, pty: Option<&Pty>) -> Result<Machine> {
    let mut debugcon = Vec::new();
    for text in &args.debugcon {
        let (number, to) = text.split_once('=').ok_or_else(|| anyhow!("--debugcon {text}: PORT=WHERE"))?;
        let number = port(number).map_err(|e| anyhow!("--debugcon {text}: {e}"))?;
        debugcon.push((number, sink("--debugcon", to)?));
    }
    let now = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_secs() as i64);
    let config = Config {
        memory: args.memory,
        epoch: if args.deterministic { 0 } else { now },
        counted_time: args.deterministic,
        serial: pty.map_or_else(|| sink("--serial", args.serial()), Pty::sink)?,
        debugcon,
        debug_exit: args.debug_exit,
        test_device: args.testdev,
        rom: if let Start::Bios(rom) = &inputs.start { rom.clone() } else { Vec::new() },
        firmware_files: inputs.option_roms.clone(),
        virtio: virtio_devices(args, inputs, wire)?,
        ide: inputs.drives.ide.clone(),
    };
    let vcpu = engine::for_machine(
        inputs.backend,
        inputs.model.clone(),
        args.deterministic,
        args.kernel_irqchip.map(|s| s == Switch::On),
    )
    .map_err(anyhow::Error::msg)?;
    let mut machine = Machine::new(vcpu, config).map_err(anyhow::Error::msg)?;
    let (mem, cpu) = machine.guest();
    let bytes = match &inputs.start {
        Start::Bios(_) => return Ok(machine),
        Start::Flat(bytes, at) => {
            let started = match args.mode {
                FlatMode::Real => boot::start_real(mem, cpu, bytes, *at),
                FlatMode::Prot => boot::start_flat32(mem, cpu, bytes, *at),
                FlatMode::Long => boot::start_long(mem, cpu, bytes, *at),
            };
            started.map_err(|why| anyhow!("--flat: {why}"))?;
            return Ok(machine);
        }
        Start::Kernel(bytes) => bytes,
    };
    let name = args.kernel.as_ref().map(|p| p.to_string_lossy()).unwrap_or_default();
    let initrd_name = args.initrd.as_ref().map(|p| p.to_string_lossy()).unwrap_or_default();
    let payload = Payload {
        name: &name,
        kernel: bytes,
        initrd: inputs.initrd.as_deref().map(|bytes| (&*initrd_name, bytes)),
        command_line: &args.append,
        unpack: !args.no_unpack,
    };
    machine.leave_firmware();
    let (mem, cpu) = machine.guest();
    boot::load(mem, cpu, &payload).map_err(|why| anyhow!("--kernel {name}: {why}"))?;
    Ok(machine)
}

/// The state in the words of `bivisor exec`.
fn dump(path: &Path, s: &CpuState) -> Result<()> {
    let state = serde_json::json!({
        "regs": response::regs(s),
        "segs": response::segs(s),
        "sys": response::sys(s),
        "fpu": response::fpu(s),
        "vec": response::vec(s),
    });
    let mut file = File::create(path).with_context(|| format!("--dump-state {}", path.display()))?;
    serde_json::to_writer_pretty(&mut file, &state)?;
    file.write_all(b"\n")?;
    Ok(())
}
