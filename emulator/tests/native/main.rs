//! x87 and SIMD instructions of the interpreter against the same bytes on the host CPU: every code of class Native that the host has,
//! register and memory forms, random registers. It proves routing: which registers, flags and bytes an instruction reads and writes,
//! and which fault comes; the arithmetic is the host's on both sides.

mod generate;
mod raw;

use bivisor_emulator::bus::Bus;
use bivisor_emulator::cpu::{CpuModel, CpuState, Fault, Rflags, XsaveArea, xsave};
use bivisor_emulator::interp::Interpreter;
use bivisor_emulator::interp::alu::Vendor;
use bivisor_emulator::isa::{Class, Width, facts};
use bivisor_emulator::mem::{FlatSpace, GuestMemory, Prot, Ram, Vma};
use bivisor_emulator::vcpu::{Board, Exit, Intercepts, Vcpu};
use generate::Rng;
use iced_x86::{Code, Encoder, Instruction, OpKind};
use raw::{End, Host};
use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex};

/// Both sides.
struct Pair {
    host: Host,
    interp: Interpreter,
    memory: GuestMemory,
    bus: Window,
    kind: Kind,
}

/// What the interpreter's memory is. Operands are accessed in place where they can be, else by way of a buffer.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Kind {
    /// The process's own: in place, the host's faults.
    Flat,
    /// RAM behind page tables: in place inside a page, masked forms in software.
    Ram,
    /// Behind page tables and on the bus: never in place.
    Bus,
}

const KINDS: [Kind; 3] = [Kind::Flat, Kind::Ram, Kind::Bus];

/// Guest-physical addresses of code and data under paging.
const CODE_GPA: u64 = 0x1_0000;
const DATA_GPA: u64 = 0x2_0000;
const BUS_GPA: u64 = 0x4000_0000;

/// The data window as a device.
struct Window(Mutex<Vec<u8>>);

impl Bus for Window {
    fn read_mmio(&self, gpa: u64, data: &mut [u8]) {
        let at = (gpa - BUS_GPA) as usize;
        data.copy_from_slice(&self.0.lock().expect("no panic")[at..at + data.len()]);
    }
    fn write_mmio(&self, gpa: u64, data: &[u8]) {
        let at = (gpa - BUS_GPA) as usize;
        self.0.lock().expect("no panic")[at..at + data.len()].copy_from_slice(data);
    }
}

/// What either side left.
#[derive(Clone, Debug, PartialEq)]
struct Outcome {
    end: String,
    gpr: [u64; 16],
    rflags: u64,
    xsave: XsaveArea,
    data: Vec<u8>,
}

/// Page tables at 0x1000 that map the code page and the data pages at their host addresses.
fn paged(host: &Host, kind: Kind) -> GuestMemory {
    let ram = GuestMemory::Ram(Ram::new(1 << 20).expect("1 MiB"));
    let mut free = 0x2000;
    let mut map = |linear: u64, gpa: u64| {
        let mut table = 0x1000;
        for shift in [39, 30, 21] {
            let at = table + (linear >> shift & 511) * 8;
            let mut entry = ram.load(at, Width::Q).expect("RAM");
            if entry == 0 {
                entry = free | 7;
                free += 0x1000;
                ram.store(at, Width::Q, entry).expect("RAM");
            }
            table = entry & !0xfff;
        }
        ram.store(table + (linear >> 12 & 511) * 8, Width::Q, gpa | 7).expect("RAM");
    };
    map(host.code_address() & !4095, CODE_GPA);
    let data = if kind == Kind::Bus { BUS_GPA } else { DATA_GPA };
    for n in 0..raw::DATA_LEN as u64 / 4096 {
        map(host.data_address() + n * 4096, data + n * 4096);
    }
    ram
}

fn flat(host: &Host) -> GuestMemory {
    let flat = FlatSpace::new();
    let vma = |start: u64, len: u64, prot| Vma {
        start: start & !4095,
        end: (start & !4095) + len,
        prot,
        shared: false,
        name: "".into(),
        offset: 0,
        backing: None,
    };
    flat.insert(vma(host.code_address(), 4096, Prot::READ | Prot::EXEC));
    flat.insert(vma(host.data_address(), raw::DATA_LEN as u64, Prot::READ | Prot::WRITE));
    flat.insert(vma(host.data_address() + raw::DATA_LEN as u64, 4096, Prot::empty()));
    GuestMemory::Flat(flat)
}

impl Pair {
    fn new(kind: Kind) -> Pair {
        let host = Host::new();
        let memory = if kind == Kind::Flat { flat(&host) } else { paged(&host, kind) };
        let mut interp = Interpreter::new(Arc::new(CpuModel::host()));
        interp.set_intercepts(Intercepts::EXCEPTIONS);
        Pair { host, interp, memory, bus: Window(Mutex::new(Vec::new())), kind }
    }

    /// Gives the interpreter its code and data.
    fn put(&mut self, code: &[u8], data: &[u8]) {
        let rip = self.host.code_address();
        match self.kind {
            Kind::Flat => {
                self.host.data().copy_from_slice(data);
                // The code was changed by other means than the guest's: what was decoded from it is stale.
                let page = rip & !4095;
                self.memory.flat().expect("it is flat").protect(page..page + 4096, Prot::READ | Prot::EXEC);
                return;
            }
            Kind::Ram => self.memory.write(DATA_GPA, data).expect("RAM"),
            Kind::Bus => *self.bus.0.lock().expect("no panic") = data.to_vec(),
        }
        self.memory.write(CODE_GPA + (rip & 4095), code).expect("RAM");
    }

    /// The interpreter's data.
    fn take(&mut self) -> Vec<u8> {
        match self.kind {
            Kind::Flat => self.host.data().to_vec(),
            Kind::Ram => {
                let mut data = vec![0; raw::DATA_LEN];
                self.memory.read(DATA_GPA, &mut data).expect("RAM");
                data
            }
            Kind::Bus => self.bus.0.lock().expect("no panic").clone(),
        }
    }

    /// Runs `count` instructions on both and gives what they left.
    fn run(&mut self, code: &[u8], count: u64, start: &Start) -> (Outcome, Outcome) {
        self.host.load(code);
        self.host.data().copy_from_slice(&start.data);
        let s = self.host.state();
        s.gpr = start.gpr;
        s.rflags = start.rflags;
        s.xsave = start.xsave.clone();
        let end = self.host.run();
        let s = self.host.state();
        let (gpr, rflags, xsave) = (s.gpr, s.rflags, s.xsave.clone());
        let native = Outcome { end: name(end), gpr, rflags: clear(rflags), xsave, data: self.host.data().to_vec() };

        self.put(code, &start.data);
        let mut state = CpuState::long64(3);
        state.rip = self.host.code_address();
        state.cr3 = 0x1000;
        state.gpr = start.gpr;
        state.rflags = Rflags::from_bits_retain(start.rflags);
        state.xsave = start.xsave.clone();
        *self.interp.state() = state;
        let exit = self.interp.run(Board { mem: &self.memory, bus: &self.bus }, count);
        let end = match exit {
            Exit::Budget => "done".to_owned(),
            Exit::Exception(Fault::Ud) => "sigill".to_owned(),
            Exit::Exception(Fault::Xm | Fault::Mf) => "sigfpe".to_owned(),
            Exit::Exception(Fault::Pf { addr, .. }) => format!("sigsegv {addr:x}"),
            Exit::Exception(Fault::Gp(0) | Fault::Ss(0)) => "sigsegv 0".to_owned(),
            other => format!("{other:?}"),
        };
        let data = self.take();
        let s = self.interp.state();
        let (gpr, rflags, xsave) = (s.gpr, s.rflags.bits(), s.xsave.clone());
        (native, Outcome { end, gpr, rflags: clear(rflags), xsave, data })
    }
}

/// RF and IF are the kernel's and the tracer's.
fn clear(rflags: u64) -> u64 {
    rflags & 0xcd5
}

fn name(end: End) -> String {
    match end {
        End::Done => "done".to_owned(),
        End::Signal(libc::SIGILL, _) => "sigill".to_owned(),
        End::Signal(libc::SIGFPE, _) => "sigfpe".to_owned(),
        End::Signal(libc::SIGSEGV, addr) => format!("sigsegv {addr:x}"),
        End::Signal(sig, addr) => format!("signal {sig} {addr:x}"),
    }
}

/// Registers and memory before.
struct Start {
    gpr: [u64; 16],
    rflags: u64,
    xsave: XsaveArea,
    data: Vec<u8>,
}

/// How wild the state may be.
#[derive(Clone, Copy, PartialEq)]
enum Mood {
    /// All exceptions masked, operands in place.
    Calm,
    /// Exceptions unmasked at random.
    Unmasked,
    /// The memory operand at the end of what is mapped, or misaligned.
    Edge,
}

fn start(r: &mut Rng, host: &Host, i: &Instruction, mood: Mood) -> Start {
    let mut x = XsaveArea::default();
    for n in 0..32 {
        let mut z = [0; 64];
        generate::vector_data(r, &mut z);
        x.set_zmm(n, z);
    }
    for n in 0..8 {
        let k = if r.chance(3) { r.next() & r.next() & r.next() } else { r.next() };
        x.set_opmask(n, k);
    }
    let masks = if mood == Mood::Unmasked { r.next() as u32 & 0x1f80 } else { 0x1f80 };
    x.set_mxcsr(masks | (r.next() as u32 & 0xe07f));
    x87(r, &mut x, mood);
    let mut gpr = std::array::from_fn(|_| if r.chance(3) { r.below(40) } else { r.next() });
    let mut data = vec![0; raw::DATA_LEN];
    generate::vector_data(r, &mut data);
    let aligned = host.data_address() + 1024 + 64 * r.below(8);
    let displacement = i.memory_displacement64();
    gpr[3] = match mood {
        Mood::Edge if r.chance(3) => aligned + r.below(64),
        Mood::Edge => (host.data_address() + raw::DATA_LEN as u64 - r.below(80)).wrapping_sub(displacement),
        _ => aligned,
    };
    if (0..i.op_count()).any(|n| i.op_kind(n) == OpKind::MemorySegRDI) {
        gpr[7] = gpr[3];
    }
    if i.is_vsib() {
        // Indices small enough to stay inside, or just past the end.
        let n = i.memory_index().number();
        let mut z = [0; 64];
        let wide = i.is_vsib64();
        let far = if mood == Mood::Edge { 12 } else { 120 };
        for c in z.chunks_mut(if wide { 8 } else { 4 }) {
            let v = (r.below(far) as i64 - if mood == Mood::Edge { 10 } else { 60 }).to_le_bytes();
            let len = c.len();
            c.copy_from_slice(&v[..len]);
        }
        x.set_zmm(n, z);
    }
    Start { gpr, rflags: 0x202 | (r.next() & 0x8d5), xsave: x, data }
}

fn x87(r: &mut Rng, x: &mut XsaveArea, mood: Mood) {
    let masks = if mood == Mood::Unmasked { r.next() as u16 & 0x3f } else { 0x3f };
    x.set_fcw(0x40 | masks | (r.next() as u16 & 0x0f00));
    // Sticky flags of unmasked exceptions would be pending: seldom.
    let sticky = r.next() as u16 & if r.chance(4) { 0x3f } else { masks };
    let pending = sticky & !masks != 0;
    let fsw = (r.next() as u16 & 0x7f00) | (sticky & 0x3f) | if pending { 0x8080 } else { 0 };
    x.set_fsw(fsw);
    x.set_ftw_abridged(if r.chance(2) { 0xff } else { r.next() as u8 });
    for n in 0..8 {
        let v = generate::x87_value(r);
        x.set_st(n, v);
    }
}

fn encode(i: &Instruction, rip: u64) -> Option<Vec<u8>> {
    let mut e = Encoder::new(64);
    e.encode(i, rip).ok()?;
    Some(e.take_buffer())
}

/// State instructions have their own tests; the rest is for the random ones.
fn is_regular(code: Code) -> bool {
    use iced_x86::Mnemonic as M;
    !matches!(
        code.mnemonic(),
        M::Fxsave
            | M::Fxsave64
            | M::Fxrstor
            | M::Fxrstor64
            | M::Xsave
            | M::Xsave64
            | M::Xsaveopt
            | M::Xsaveopt64
            | M::Xsavec
            | M::Xsavec64
            | M::Xrstor
            | M::Xrstor64
    )
}

fn is_microcoded(code: Code) -> bool {
    use iced_x86::Mnemonic as M;
    matches!(code.mnemonic(), M::Fnsave | M::Frstor | M::Fnstenv | M::Fldenv)
}

fn codes() -> Vec<Code> {
    let model = CpuModel::host();
    Code::values()
        .filter(|&c| facts(c).class == Class::Native && model.supports(c) && c.op_code().mode64())
        // WAIT and its instruction are two for the processor.
        .filter(|&c| !c.op_code().fwait())
        .collect()
}

fn differences(a: &Outcome, b: &Outcome) -> String {
    let mut out = String::new();
    let mut put = |what: &str, a: String, b: String| {
        if a != b {
            out += &format!("  {what}: host {a}, interpreter {b}\n");
        }
    };
    put("end", a.end.clone(), b.end.clone());
    put("rflags", format!("{:x}", a.rflags), format!("{:x}", b.rflags));
    for n in 0..16 {
        put(&format!("gpr{n}"), format!("{:x}", a.gpr[n]), format!("{:x}", b.gpr[n]));
    }
    put("mxcsr", format!("{:x}", a.xsave.mxcsr()), format!("{:x}", b.xsave.mxcsr()));
    put("x87", format!("{:x?}", a.xsave.legacy()), format!("{:x?}", b.xsave.legacy()));
    for n in 0..32 {
        put(&format!("zmm{n}"), format!("{:02x?}", a.xsave.zmm(n)), format!("{:02x?}", b.xsave.zmm(n)));
    }
    for n in 0..8 {
        put(&format!("k{n}"), format!("{:x}", a.xsave.opmask(n)), format!("{:x}", b.xsave.opmask(n)));
    }
    let first = a.data.iter().zip(&b.data).position(|(a, b)| a != b).map(|n| n.min(a.data.len() - 32));
    if let Some(n) = first {
        put(&format!("data+{n:x}"), format!("{:02x?}", &a.data[n..][..32]), format!("{:02x?}", &b.data[n..][..32]));
    }
    out
}

/// Runs `rounds` random instances of every code.
/// How often a difference must show that a switch of threads on the host can make.
const SWITCHES: usize = 10;

fn compare_all(kind: Kind, seed: u64, rounds: usize, mood: Mood) -> BTreeSet<Code> {
    compare(kind, seed, rounds, mood, &[], |_| true)
}

fn compare_x87(seed: u64, mood: Mood, follow: &[u8]) {
    use iced_x86::CpuidFeature as F;
    let x87 = |c: Code| c.cpuid_features().iter().any(|f| matches!(f, F::FPU | F::FPU287 | F::FPU387 | F::MMX));
    for kind in KINDS {
        compare(kind, seed, 8, mood, follow, x87);
    }
}

fn compare(
    kind: Kind,
    seed: u64,
    rounds: usize,
    mood: Mood,
    follow: &[u8],
    want: impl Fn(Code) -> bool,
) -> BTreeSet<Code> {
    let mut pair = Pair::new(kind);
    let mut r = Rng(seed);
    let mut tested = BTreeSet::new();
    let mut failed: BTreeMap<String, (usize, String)> = BTreeMap::new();
    let mut count = 0;
    for code in codes().into_iter().filter(|&c| is_regular(c) && want(c)) {
        for round in 0..2 * rounds {
            let memory = round % 2 == 0;
            if mood == Mood::Edge && !memory {
                continue;
            }
            let Some(i) = generate::instruction(&mut r, code, memory) else { continue };
            let Some(mut bytes) = encode(&i, pair.host.code_address()) else { continue };
            bytes.extend(follow);
            let start = start(&mut r, &pair.host, &i, mood);
            let steps = if follow.is_empty() { 1 } else { 2 };
            let (mut native, mut ours) = pair.run(&bytes, steps, &start);
            // A switch of threads between the two instructions costs an AMD host its x87 pointers.
            for _ in 0..if follow.is_empty() { 0 } else { SWITCHES } {
                if native == ours {
                    break;
                }
                (native, ours) = pair.run(&bytes, steps, &start);
            }
            tested.insert(code);
            count += 1;
            if is_microcoded(code) {
                // Their order of accesses is their own: the address tells the page.
                for o in [&mut native, &mut ours] {
                    if o.end.len() > 12 {
                        o.end.truncate(o.end.len() - 3);
                    }
                }
            }
            if native != ours {
                let text = format!("{i} [{bytes:02x?}]\n{}", differences(&native, &ours));
                failed.entry(format!("{code:?}")).or_insert((0, text)).0 += 1;
            }
        }
    }
    println!("{count} instructions of {} codes compared, memory {kind:?}", tested.len());
    if !failed.is_empty() {
        for (code, (n, text)) in failed.iter().take(40) {
            println!("{code}: {n} times, first: {text}");
        }
        panic!("{} codes differ: {:?}", failed.len(), failed.keys().collect::<Vec<_>>());
    }
    tested
}

#[test]
fn every_code_with_exceptions_masked() {
    let tested = compare_all(Kind::Flat, 1, 6, Mood::Calm);
    compare_all(Kind::Ram, 11, 6, Mood::Calm);
    compare_all(Kind::Bus, 21, 6, Mood::Calm);
    let all = codes();
    let missing: Vec<_> = all.iter().filter(|c| is_regular(**c) && !tested.contains(c)).collect();
    println!("{} of {} codes of class Native on this host; not generated: {missing:?}", tested.len(), all.len());
    assert!(missing.is_empty(), "{missing:?}");
}

#[test]
fn every_code_with_exceptions_unmasked() {
    for kind in KINDS {
        compare_all(kind, 2 + kind as u64, 6, Mood::Unmasked);
    }
}

#[test]
fn every_memory_form_at_the_edge() {
    for kind in KINDS {
        compare_all(kind, 3 + kind as u64, 12, Mood::Edge);
    }
}

/// FNSTENV [RBX]: shows the instruction and operand pointers, and leaves all masked.
#[test]
fn x87_pointers() {
    compare_x87(4, Mood::Calm, &[0xd9, 0x33]);
    compare_x87(5, Mood::Unmasked, &[0xd9, 0x33]);
    // FNSAVE and the 16-bit form of FNSTENV.
    compare_x87(6, Mood::Unmasked, &[0xdd, 0x33]);
    compare_x87(7, Mood::Unmasked, &[0x66, 0xd9, 0x33]);
}

/// A memory image for XRSTOR and FXRSTOR: mostly good, sometimes with a bad header, MXCSR or format.
fn put_image(r: &mut Rng, data: &mut [u8]) {
    let mut x = XsaveArea::default();
    for n in 0..32 {
        let mut z = [0; 64];
        generate::vector_data(r, &mut z);
        x.set_zmm(n, z);
    }
    (0..8).for_each(|n| x.set_opmask(n, r.next()));
    x87(r, &mut x, Mood::Unmasked);
    x.set_fip(r.next() >> 17);
    x.set_fdp(r.next() >> 17);
    x.set_fop(r.next() as u16 & 0x7ff);
    x.set_mxcsr(r.next() as u32 & 0xffff);
    if r.chance(8) {
        x.set_mxcsr(1 << (16 + r.below(16)));
    }
    let all = CpuModel::host().xcr0();
    let bv = if r.chance(3) { all } else { r.next() & all };
    x.set_xstate_bv(if r.chance(8) { r.next() } else { bv });
    let n = x.bytes.len();
    data[..n].copy_from_slice(&x.bytes);
    if r.chance(2) {
        // Compacted; seldom with components that XCOMP_BV lacks.
        let xcomp = if r.chance(4) { r.next() & all } else { bv | r.next() & all };
        data[520..528].copy_from_slice(&(xcomp | 1 << 63).to_le_bytes());
    }
    if r.chance(8) {
        data[520 + r.below(56) as usize] = 1;
    }
}

#[test]
fn state_instructions() {
    if Vendor::host() == Vendor::Intel {
        // Which components of zeros are in use, and what XSAVEOPT leaves out, is the processor's own (SDM 1 13.6).
        println!(
            "SKIPPED state_instructions: of Intel's CPUs the campaign compares what XSAVE and XRSTOR do; this asks for more than they promise"
        );
        return;
    }
    KINDS.into_iter().for_each(compare_state);
}

fn compare_state(kind: Kind) {
    let mut pair = Pair::new(kind);
    let mut r = Rng(8 + kind as u64);
    let mut failed: BTreeMap<String, (usize, String)> = BTreeMap::new();
    let all = CpuModel::host().xcr0();
    let list: Vec<Code> = codes().into_iter().filter(|&c| !is_regular(c)).collect();
    let mut ends: BTreeMap<String, usize> = BTreeMap::new();
    for code in list.iter().copied() {
        for round in 0..600 {
            let Some(mut i) = generate::instruction(&mut r, code, true) else { panic!("{code:?}") };
            i.set_memory_displacement64(0);
            i.set_memory_displ_size(0);
            let bytes = encode(&i, pair.host.code_address()).expect("encodes");
            let mut s = start(&mut r, &pair.host, &i, Mood::Calm);
            put_image(&mut r, &mut s.data[1024..]);
            s.gpr[0] = if r.chance(3) { u64::MAX } else { r.next() };
            s.gpr[2] = if r.chance(2) { 0 } else { r.next() };
            s.gpr[3] = pair.host.data_address() + 1024;
            match r.below(10) {
                0 => s.gpr[3] += 16,
                1 => s.gpr[3] += 8,
                2 => {
                    // The end of the image past the end of what is mapped.
                    let at = raw::DATA_LEN - 64 * (1 + r.below(40) as usize);
                    put_image(&mut r, &mut s.data[1024..]);
                    let image = s.data[1024..4096].to_vec();
                    let n = image.len().min(raw::DATA_LEN - at);
                    s.data[at..at + n].copy_from_slice(&image[..n]);
                    s.gpr[3] = pair.host.data_address() + at as u64;
                }
                _ => {}
            }
            // Components in their initial configuration, and zeros in those that are not.
            s.xsave.set_xstate_bv(if r.chance(2) { all } else { r.next() & all });
            if r.chance(4) {
                (0..16).for_each(|n| s.xsave.set_zmm(n, [0; 64]));
            }
            if r.chance(3) {
                s.xsave.set_mxcsr(0x1f80);
            }
            let (mut native, mut ours) = pair.run(&bytes, 1, &s);
            // A switch of threads on the host may leave a component of zeros in use there, as the architecture allows (SDM 1 13.6).
            // On a loaded machine that comes more than once in a row; a real difference comes every time.
            for _ in 0..SWITCHES {
                if native == ours {
                    break;
                }
                (native, ours) = pair.run(&bytes, 1, &s);
            }
            *ends.entry(native.end.chars().take(9).collect()).or_default() += 1;
            for o in [&mut native, &mut ours] {
                // Which byte past the end is touched first, and what was done before, is the processor's own.
                if o.end.len() > 9 {
                    o.end.truncate(8);
                    o.data.clear();
                }
            }
            if native != ours {
                let at = (s.gpr[3] - pair.host.data_address()) as usize;
                let quad = |n: usize| u64::from_le_bytes(s.data[at + n..at + n + 8].try_into().expect("eight bytes"));
                let header = if at + 528 <= s.data.len() { (quad(512), quad(520)) } else { (0, 0) };
                let text = format!(
                    "{i} round {round}, {} bytes before the end, header {header:x?}, mask {:x}, in use {:x}\n{}",
                    raw::DATA_LEN - at,
                    s.gpr[0] as u32,
                    s.xsave.xstate_bv(),
                    differences(&native, &ours).lines().take(3).collect::<Vec<_>>().join("\n")
                );
                if std::env::var_os("VERBOSE").is_some() {
                    println!("{text}");
                }
                failed.entry(format!("{code:?}")).or_insert((0, text)).0 += 1;
            }
        }
    }
    println!("{} state instructions compared: {ends:?}", list.len());
    for (code, (n, text)) in &failed {
        println!("{code}: {n} times, first: {text}");
    }
    assert!(failed.is_empty(), "{:?}", failed.keys().collect::<Vec<_>>());
}

#[test]
fn layout_has_all_registers() {
    assert!(xsave::Layout::host().size <= xsave::XSAVE_SIZE);
}

/// More of what goes on in software, where seldom cases hide.
#[test]
fn gather_scatter_and_masked_moves() {
    let want = |c: Code| {
        let name = format!("{:?}", c.mnemonic()).to_lowercase();
        ["gather", "scatter", "maskmov", "compress", "expand"].iter().any(|n| name.contains(n))
    };
    for kind in KINDS {
        compare(kind, 31 + kind as u64, 100, Mood::Edge, &[], want);
    }
}
