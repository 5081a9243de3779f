//! `bivisor exec --moo`: single-step vectors that were captured from hardware, compared on any engine.
//!
//! Run rule of the format for an 80286: real mode, the state loaded, what memory is not named is HLT, run to HLT; exceptions go through the
//! interrupt vector table; ports read ones.

mod design;
mod format;

use crate::engine::{self, Backend};
use anyhow::{Context, Result, anyhow, bail};
use bivisor_emulator::bus::EmptyBus;
use bivisor_emulator::cpu::cpuid::CpuModel;
use bivisor_emulator::cpu::{CpuState, Rflags, Segment};
use bivisor_emulator::isa::Seg;
use bivisor_emulator::mem::{GuestMemory, Ram};
use bivisor_emulator::vcpu::{Board, Exit, Intercepts, Vcpu};
use format::{NAMES, Test};
use iced_x86::{Decoder, DecoderOptions, Mnemonic, OpKind};
use serde::Serialize;
use std::collections::BTreeMap;
use std::io::{Read, Write};
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// The CPU whose name asks to count apart what differs by design.
const OLD: &str = "80286";

/// What memory holds that a test does not name: HLT.
const FILL: u8 = 0xf4;
const SIZE: u64 = 0x11_0000;

/// Differences shown of each file.
const SHOWN: usize = 3;

/// Encoding order of the general registers that the format lists first, and where SP to DI are in it.
const GPR: [(usize, usize); 8] = [(0, 0), (1, 3), (2, 1), (3, 2), (8, 4), (9, 5), (10, 6), (11, 7)];
const SEGMENTS: [(usize, Seg); 4] = [(4, Seg::Cs), (5, Seg::Ss), (6, Seg::Ds), (7, Seg::Es)];
const IP: usize = 12;
const FLAGS: usize = 13;

/// The flags that a 286 has in real mode; initial values carry rubbish in the others.
const REAL: u16 = 0x0fd5;

/// What became of the vectors of a file.
#[derive(Default, Serialize)]
struct Report {
    file: String,
    cases: usize,
    equal: usize,
    /// Equal but for flags that the manual calls undefined.
    equal_but_undefined: usize,
    /// With the CPU 80286: different as later processors are, by reason.
    by_design: BTreeMap<&'static str, Vec<u32>>,
    different: usize,
    /// The first of them.
    shown: Vec<String>,
}

/// Runs the files and prints a line for each, or a JSON object. Status 0 if nothing differs.
pub fn run(files: &[PathBuf], backend: Backend, cpu: &str, json: bool) -> Result<i32> {
    let model = if cpu == OLD { CpuModel::max() } else { CpuModel::from_name(cpu).map_err(anyhow::Error::msg)? };
    let engine = engine::for_code(backend, Arc::new(model)).map_err(anyhow::Error::msg)?;
    let mut bench = Bench::new(engine)?;
    let mut out = std::io::stdout().lock();
    let mut total = Report { file: "total".into(), ..Report::default() };
    for path in files {
        let r = file(&mut bench, path, cpu == OLD)?;
        total.add(&r);
        print(&mut out, &r, json)?;
    }
    if files.len() > 1 {
        print(&mut out, &total, json)?;
    }
    Ok(i32::from(total.different > 0))
}

fn print(out: &mut impl Write, r: &Report, json: bool) -> Result<()> {
    if json {
        serde_json::to_writer(&mut *out, r)?;
        return Ok(out.write_all(b"\n")?);
    }
    let by_design: usize = r.by_design.values().map(Vec::len).sum();
    writeln!(
        out,
        "{}: {} cases, {} equal, {} equal but for undefined flags, {by_design} different by design, {} different",
        r.file, r.cases, r.equal, r.equal_but_undefined, r.different
    )?;
    for (why, cases) in &r.by_design {
        writeln!(out, "    {}: {why}", cases.len())?;
    }
    r.shown.iter().try_for_each(|s| writeln!(out, "    {s}"))?;
    Ok(())
}

impl Report {
    fn add(&mut self, r: &Report) {
        self.cases += r.cases;
        self.equal += r.equal;
        self.equal_but_undefined += r.equal_but_undefined;
        self.different += r.different;
        for (why, cases) in &r.by_design {
            self.by_design.entry(why).or_default().extend(cases);
        }
    }
}

fn file(bench: &mut Bench, path: &Path, old: bool) -> Result<Report> {
    let name = path.display();
    let mut bytes = std::fs::read(path).with_context(|| format!("--moo {name}"))?;
    if bytes.starts_with(&[0x1f, 0x8b]) {
        let packed = std::mem::take(&mut bytes);
        flate2::read::GzDecoder::new(&packed[..]).read_to_end(&mut bytes).with_context(|| format!("--moo {name}"))?;
    }
    let tests = format::parse(&bytes).ok_or_else(|| anyhow!("--moo {name}: not a whole MOO file of an 80286"))?;
    if tests.is_empty() {
        bail!("--moo {name}: no vectors in it");
    }
    let mut r = Report { file: name.to_string(), cases: tests.len(), ..Report::default() };
    for t in &tests {
        match (bench.run(t), design::not_as_today(t)) {
            (Ok(true), _) => r.equal += 1,
            (Ok(false), _) => r.equal_but_undefined += 1,
            (Err(_), Some(why)) if old => r.by_design.entry(why).or_default().push(t.index),
            (Err(why), _) => {
                r.different += 1;
                if r.shown.len() < SHOWN {
                    r.shown.push(format!("#{} {} {:02x?} {:?}: {why}", t.index, t.name, t.bytes(), t.exception));
                }
            }
        }
    }
    Ok(r)
}

struct Bench {
    engine: Box<dyn Vcpu + Send>,
    mem: GuestMemory,
    dirty: Vec<u32>,
}

impl Bench {
    fn new(mut engine: Box<dyn Vcpu + Send>) -> Result<Bench> {
        let mem = GuestMemory::Ram(Ram::new(SIZE).context("memory for the vectors")?);
        mem.write(0, &vec![FILL; SIZE as usize]).ok_or_else(|| anyhow!("memory for the vectors cannot be written"))?;
        engine.set_intercepts(Intercepts::empty());
        Ok(Bench { engine, mem, dirty: Vec::new() })
    }

    fn load(&mut self, t: &Test) {
        // Addresses beyond the memory of real mode would be a file's mistake: they are dropped.
        for address in self.dirty.drain(..) {
            let _ = self.mem.write(u64::from(address), &[FILL]);
        }
        for (address, v) in &t.before.ram {
            let _ = self.mem.write(u64::from(*address), &[*v]);
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

    /// Runs to HLT and says what differs; `false` if only undefined flags do.
    fn run(&mut self, t: &Test) -> Result<bool, String> {
        self.load(t);
        let exit = self.engine.run(Board { mem: &self.mem, bus: &EmptyBus }, 100_000);
        if exit != Exit::Halt {
            return Err(format!("{exit:?}"));
        }
        let undefined = undefined_flags(t);
        let mut exact = true;
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
            let mask = if n == FLAGS { REAL } else { 0xffff };
            let want = t.after.regs[n].or(t.before.regs[n]).unwrap_or(0);
            let wrong = (want ^ got) & mask;
            if wrong & !(if n == FLAGS { undefined } else { 0 }) != 0 {
                return Err(format!("{} {want:#06x}, here {got:#06x}", NAMES[n]));
            }
            exact &= wrong == 0;
        }
        // The flags that an exception pushed have undefined bits too.
        let pushed = t.exception.map(|_| (u32::from(got[5]) * 16).wrapping_add(u32::from(got[8].wrapping_add(4))));
        for (address, want) in &t.after.ram {
            let mut got = [0];
            let _ = self.mem.read(u64::from(*address), &mut got);
            let (mask, loose) = match pushed.map(|p| address.wrapping_sub(p)) {
                Some(0) => (REAL as u8, undefined as u8),
                Some(1) => ((REAL >> 8) as u8, (undefined >> 8) as u8),
                _ => (0xff, 0),
            };
            let wrong = (want ^ got[0]) & mask;
            if wrong & !loose != 0 {
                return Err(format!("[{address:#07x}] {want:#04x}, here {:#04x}", got[0]));
            }
            exact &= wrong == 0;
        }
        Ok(exact)
    }
}

/// The manual's undefined flags of the instruction. OF after a rotation through CF of other than one bit is among them also where all bits
/// come back (SDM 2B RCL): processors differ.
fn undefined_flags(t: &Test) -> u16 {
    let bytes = t.bytes();
    let i = Decoder::new(16, &bytes, DecoderOptions::NONE).decode();
    let mut undefined = Rflags::status_from_iced(i.rflags_undefined());
    let through_carry = matches!(i.mnemonic(), Mnemonic::Rcl | Mnemonic::Rcr) && i.op1_kind() == OpKind::Immediate8;
    undefined.set(Rflags::OF, undefined.contains(Rflags::OF) || through_carry && i.immediate8() & 31 > 1);
    undefined.bits() as u16
}
