//! What the translator makes of one block, for people to read: which host code belongs to which guest instruction, and in which way it
//! was lowered. Nothing is run and nothing is cached.

use crate::block::{CodeSource, Opened, Scratch};
use crate::lower::{Leave, Surroundings, Unit, lower};
use crate::marks::{Home, Mark, What};
use crate::route::{Policy, Route, Routes};
use crate::system;
use crate::system::area::at;
use crate::system::block::Way;
use bivisor_emulator::cpu::CpuState;
use bivisor_emulator::cpu::cpuid::CpuModel;
use bivisor_emulator::mem::{PAGE_SIZE, Ram};
use bivisor_emulator::vcpu::How;
use std::ops::Range;
use std::sync::Arc;

/// Which of the two translators.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Target {
    /// A Linux process: memory operands are the host's.
    Process,
    /// A machine at CPL 0: accesses go through the inline TLB.
    Kernel,
}

/// One guest instruction and its host code.
#[derive(Clone, Debug)]
pub struct Piece {
    /// Distance from the start of the block, and length.
    pub guest: Range<usize>,
    /// Offsets in [`Explained::code`].
    pub host: Range<usize>,
    /// [`How::Copied`], [`How::Rewritten`], [`How::ByInterpreter`] or [`How::Exits`].
    pub how: How,
    /// The way of lowering, as the source names it.
    pub way: String,
    /// The source file with the function that lowers it, and the function.
    pub place: (&'static str, &'static str),
}

/// A translated block.
#[derive(Clone, Debug)]
pub struct Explained {
    /// Address of the block.
    pub start: u64,
    /// The guest's bytes.
    pub bytes: Vec<u8>,
    /// The host's; its first byte is thought to be at [`HOST`].
    pub code: Vec<u8>,
    /// One piece an instruction.
    pub pieces: Vec<Piece>,
    /// Stubs, cold code and constants behind the block.
    pub rest: Range<usize>,
    /// The ways out: where they lead, and whether the jump can be patched to go straight to translated code.
    pub exits: Vec<(String, bool)>,
}

/// Where the host code is thought to lie.
pub const HOST: u64 = 0x100_0000;
/// Where ways out are thought to lie.
const OUT: u64 = HOST - 0x1000;

struct Bytes<'a> {
    start: u64,
    bytes: &'a [u8],
}

impl CodeSource for Bytes<'_> {
    fn open(&mut self, _: u64) -> Opened {
        Opened::Watched
    }
    fn read(&mut self, at: u64, to: &mut [u8]) -> bool {
        to.fill(0);
        let Some(from) = at.checked_sub(self.start).and_then(|d| self.bytes.get(d as usize..)) else { return false };
        let n = from.len().min(to.len());
        to[..n].copy_from_slice(&from[..n]);
        n > 0
    }
    fn epoch(&self) -> u64 {
        0
    }
}

/// Translates the block at the start of `bytes`; `None` if its first instruction cannot be decoded.
pub fn explain(bytes: &[u8], start: u64, target: Target) -> Option<Explained> {
    let model = Arc::new(CpuModel::host());
    match target {
        Target::Process => process(bytes, start, model),
        Target::Kernel => kernel(bytes, start, model),
    }
}

fn how_of(route: Route) -> (How, (&'static str, &'static str)) {
    const BRANCH: &str = "translator/src/lower/branch.rs";
    match route {
        Route::Copy | Route::CopyAndEnd => (How::Copied, ("translator/src/lower/copy.rs", "copy")),
        Route::Conditional => (How::Rewritten, (BRANCH, "conditional")),
        Route::Counted => (How::Rewritten, (BRANCH, "counted")),
        Route::Jump => (How::Rewritten, (BRANCH, "jump")),
        Route::Call => (How::Rewritten, (BRANCH, "call")),
        Route::JumpIndirect | Route::CallIndirect => (How::Rewritten, (BRANCH, "indirect")),
        Route::Return => (How::Rewritten, (BRANCH, "ret")),
        Route::Syscall => (How::Exits, ("translator/src/lower/mod.rs", "leave")),
        Route::Step => (How::ByInterpreter, ("translator/src/lower/mod.rs", "leave")),
    }
}

fn process(bytes: &[u8], start: u64, model: Arc<CpuModel>) -> Option<Explained> {
    let routes = Routes::new(model, Policy::default());
    let mut decoder = Scratch::default();
    if !decoder.decode(&mut Bytes { start, bytes }, start, &routes, crate::block::MAX_INSNS) {
        return None;
    }
    let block = &decoder.block;
    let around = Surroundings {
        at: HOST,
        first_exit: 0,
        stubs: HOST + 0x10_0000,
        miss: OUT,
        home: Home::Slot,
        known: &|_, _| None,
        linked: true,
    };
    let unit = lower(block, &around, false, Unit::default());
    let items = &block.items[..usize::from(unit.insns).min(block.items.len())];
    let starts = starts(&unit.marks, &unit, block.start);
    let end = unit.code.len();
    let mut pieces: Vec<Piece> = Vec::new();
    for item in items {
        let from = starts.iter().find(|(guest, _)| *guest == item.at).map_or(end, |(_, host)| *host);
        if let Some(last) = pieces.last_mut() {
            last.host.end = from.max(last.host.start);
        }
        let (how, place) = how_of(item.route);
        let guest = usize::from(item.at)..usize::from(item.at) + usize::from(item.len);
        // An instruction with RIP-relative or GS-relative memory is not the same bytes.
        pieces.push(Piece { guest, host: from..end.max(from), how, way: format!("{:?}", item.route), place });
    }
    for piece in &mut pieces {
        if piece.how == How::Copied && unit.code[piece.host.clone()] != block.bytes[piece.guest.clone()] {
            piece.how = How::Rewritten;
        }
    }
    let exits = unit.exits.iter().map(|e| match e.leave {
        Leave::To(rip) => (format!("to the block at {rip:#x}"), true),
        Leave::Step(rip) => (format!("one interpreter step at {rip:#x}"), false),
        Leave::Syscall(rip, _) => (format!("the system call at {rip:#x}"), false),
        Leave::Changed(rip) => (format!("the code at {rip:#x} has changed"), false),
    });
    Some(Explained {
        start,
        bytes: block.bytes[..items.last().map_or(0, |i| usize::from(i.at) + usize::from(i.len))].to_vec(),
        rest: end..unit.code.len(),
        exits: exits.collect(),
        pieces,
        code: unit.code,
    })
}

/// Where the host code of each guest instruction begins: guest distance, host offset.
fn starts(marks: &[Mark], unit: &Unit, start: u64) -> Vec<(u16, usize)> {
    let mut out: Vec<(u16, usize)> = Vec::new();
    for (i, mark) in marks.iter().enumerate() {
        let at = usize::from(mark.at);
        let end = marks.get(i + 1).map_or(unit.code.len(), |m| usize::from(m.at));
        match mark.what {
            // Copied byte for byte: every guest distance in the run is a host offset.
            What::Copied(d) => out.extend((0..(end - at) as u16).map(|n| (d + n, at + usize::from(n)))),
            What::At(d) | What::Undo(d, _) | What::Probe(d) | What::ProbePopped(d) => out.push((d, at)),
            What::Exit(id) => {
                let rip = match unit.exits[id as usize].leave {
                    Leave::Step(rip) | Leave::Syscall(rip, _) | Leave::Changed(rip) => rip,
                    Leave::To(_) => continue,
                };
                out.push((rip.wrapping_sub(start) as u16, at));
            }
            _ => {}
        }
    }
    out
}

fn kernel(bytes: &[u8], start: u64, model: Arc<CpuModel>) -> Option<Explained> {
    let mut s = CpuState::long64(0);
    s.rip = start;
    // Kernels hardly ever use vector registers; what does runs where they are loaded.
    let asleep = kernel_at(bytes, start, model.clone(), system::Mode::of(&s, 0)?)?;
    match asleep.1 {
        false => Some(asleep.0),
        true => Some(kernel_at(bytes, start, model, system::Mode::of(&s, 3)?)?.0),
    }
}

/// The second value: it wants the vector registers.
fn kernel_at(bytes: &[u8], start: u64, model: Arc<CpuModel>, mode: system::Mode) -> Option<(Explained, bool)> {
    let ram = Ram::new(4 * PAGE_SIZE).ok()?;
    let gpa = PAGE_SIZE + start % PAGE_SIZE;
    ram.write(gpa, &bytes[..bytes.len().min(2 * PAGE_SIZE as usize)])?;
    let routes = Routes::new(model, Policy::default());
    let mut next = || Some(2 * PAGE_SIZE);
    let mut source = system::block::Source { ram: &ram, gpa, next: &mut next, known: &|_| false };
    let (mut block, _) = system::block::decode(&mut source, start, mode, &routes, crate::block::MAX_INSNS)?;
    // What was given ends somewhere; zeros behind it are not code.
    let given = |i: &system::block::Item| usize::from(i.at) + usize::from(i.len) <= bytes.len();
    let keep = block.items.iter().take_while(|i| given(i)).count();
    block.items.truncate(keep.max(1));
    let len = block.items.last().map_or(0, |i| usize::from(i.at) + usize::from(i.len));
    block.bytes.truncate(len);
    let around = system::lower::Around {
        at: HOST,
        first_exit: 0,
        first_recipe: 0,
        leave: OUT,
        leave_light: OUT,
        port: OUT,
        wake: OUT,
        save: OUT,
        restore: OUT,
        walk: OUT,
        counts: false,
        fast: None,
        targets: at::TARGETS,
        tlb: at::TLB + mode.context() * system::tlb::TABLE,
        share: true,
        foresee: true,
        divides: false,
        guess: system::lower::Guess::default(),
    };
    let mut starts = Vec::new();
    let unit = system::lower::lower_noting(&block, &around, |at| starts.push(at));
    let end = *starts.last()?;
    let pieces = block.items.iter().zip(starts.windows(2)).map(|(item, host)| {
        let guest = usize::from(item.at)..usize::from(item.at) + usize::from(item.len);
        let same = unit.code[host[0]..host[1]] == block.bytes[guest.clone()];
        let (how, place) = way(item.way, same);
        Piece { guest, host: host[0]..host[1], how, way: format!("{:?}", item.way), place }
    });
    let pieces = pieces.collect();
    use system::lower::Kind;
    let exits = unit.exits.iter().map(|e| {
        let what = match e.kind {
            Kind::To => "to the block",
            Kind::Step => "one interpreter step",
            Kind::Miss { .. } => "not in the inline TLB: filled, then again",
            Kind::Port { .. } => "the device is called, then on",
            Kind::Asleep => "the vector registers are loaded, then on",
            Kind::Indirect => "the target of the branch is not known yet: looked up",
            _ => "events are looked at, then on",
        };
        (format!("{what} at {:#x}", e.rip), e.site.is_some())
    });
    let asleep = block.items.iter().any(|i| i.way == system::block::Way::Asleep);
    let explained = Explained {
        start,
        bytes: block.bytes.clone(),
        exits: exits.collect(),
        pieces,
        rest: end..unit.code.len(),
        code: unit.code,
    };
    Some((explained, asleep))
}

fn way(way: Way, same: bool) -> (How, (&'static str, &'static str)) {
    const MAIN: (&str, &str) = ("translator/src/system/lower/mod.rs", "one");
    match way {
        Way::Step => (How::ByInterpreter, MAIN),
        _ if same => (How::Copied, MAIN),
        _ => (How::Rewritten, MAIN),
    }
}
