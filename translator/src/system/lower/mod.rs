//! Lowering of the system mode: a guest block becomes host code.

pub mod asm;
mod branch;
mod flags;
mod gate;
mod memory;
mod mirror;
mod narrow;
mod replay;
mod rounds;
mod scratch;
mod sensitive;
mod stack;
mod string;
mod usual;

use crate::emit::Emitter;
use crate::system::area::at;
use crate::system::block::{Access, GuestBlock, Item, STATUS, Way};
use crate::system::walk::wanted;
use asm::{Assembler, At};
use bivisor_emulator::isa::{Class, Gpr, Width, facts};
use dynasmrt::DynasmApi;
use iced_x86::Mnemonic;
use replay::Producer;
pub use replay::{Replay, Told};
use scratch::Window;
use usual::{Sum, Sure};

/// Where the guest's status flags are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Flags {
    /// In EFLAGS.
    Host,
    /// In EFLAGS and in their slot.
    Both,
    /// In their slot, or to be told by a [`Replay`].
    Slot,
}

/// Why code is left.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// To the block at RIP; the jump can be patched.
    To,
    /// One interpreter step.
    Step,
    /// The same, if the mode must be without x87 and vector registers.
    Asleep,
    /// An access that the TLB did not have: the whole range that was asked for, and where to ask again.
    Miss {
        /// The access itself.
        access: Access,
        /// Displacement of the lowest byte of the range.
        low: i64,
        /// Bytes of the range.
        len: u16,
        /// It is to be stored to.
        write: bool,
        /// It is the access itself, and all that its instruction accesses: a page fault there is the instruction's.
        alone: bool,
        /// Code offset of the probe.
        retry: u32,
    },
    /// IN or OUT; the code goes on at an offset when it is done, or is left then.
    Port {
        /// Which; `None`: DX says.
        port: Option<u16>,
        /// Bytes.
        width: Width,
        /// OUT?
        write: bool,
        /// Where to go on.
        resume: u32,
    },
    /// INVLPG of the address in [`at::TEMP`]; the code goes on at an offset when it is done, or is left then.
    Invalidate {
        /// Where to go on.
        resume: u32,
    },
    /// An indirect branch whose target was not found; it has not begun.
    Indirect,
    /// Look at events, then go on at RIP.
    Look,
    /// As [`Kind::Look`], with interrupts held for one instruction.
    Shadow,
}

/// One exit of a piece of code.
#[derive(Clone, Copy, Debug)]
pub struct Exit {
    /// Why.
    pub kind: Kind,
    /// RIP of the guest.
    pub rip: u64,
    /// Registers whose values are in their slots.
    pub spilled: u16,
    /// Where the flags are.
    pub flags: Flags,
    /// How they are told if they are not kept.
    pub told: Option<Told>,
    /// In EFLAGS they are, and told by this recipe too.
    pub recipe: Option<u32>,
    /// Instructions done since the start of the block.
    pub done: u16,
    /// Offset of the displacement to patch, if any.
    pub site: Option<u32>,
    /// Offset of the stub.
    pub stub: u32,
    /// Does the instruction at RIP look at x87 or vector state?
    pub native: bool,
    /// Is RFLAGS.AC, and so the mode, another than the block's?
    pub toggles: bool,
    /// Where its jump leads as long as nobody wants the code to be left: the next round of a loop inside the block.
    pub again: Option<u32>,
    /// Its block; of a way into a block, that one.
    pub block: u32,
    /// Registers known to be near slots of the mirror: see [`Entries::sure`].
    pub sure: u32,
}

impl Exit {
    /// That leaves for `rip` with all registers in place; its stub is still to be emitted.
    pub fn new(kind: Kind, rip: u64, spilled: u16, flags: Flags) -> Exit {
        Exit {
            kind,
            rip,
            spilled,
            flags,
            told: None,
            recipe: None,
            done: 0,
            site: None,
            stub: 0,
            native: false,
            toggles: false,
            again: None,
            block: 0,
            sure: 0,
        }
    }
}

/// What the host may fault in.
#[derive(Clone, Copy, Debug)]
pub struct Point {
    /// Code offset of its first byte.
    pub from: u32,
    /// After its last.
    pub to: u32,
    /// Distance of the instruction from the start of the block.
    pub at: u16,
    /// Instructions before it.
    pub done: u16,
    /// Registers whose values are in their slots.
    pub spilled: u16,
    /// Where the flags are.
    pub flags: Flags,
    /// How they are told if they are not kept.
    pub told: Option<Told>,
    /// Is it a division?
    pub divides: bool,
    /// What it accesses in the mirror.
    pub access: Option<Access>,
    /// The guest's x87 opcode (SDM 1 8.1.9) where the host's has another operand, else 0.
    pub fop: u16,
    /// It only makes sure of a slot.
    pub checks: Option<Check>,
}

/// A load that makes sure of a slot.
#[derive(Clone, Copy, Debug)]
pub struct Check {
    /// That of a register; `None`: that of the access.
    pub of: Option<Gpr>,
    /// At the start of the block, before the register is needed.
    pub early: bool,
}

/// The ways into a block, as code offsets.
#[derive(Clone, Copy, Debug, Default)]
pub struct Entries {
    /// Flags in EFLAGS.
    pub host: u32,
    /// Flags in their slot.
    pub slot: u32,
    /// Flags by a recipe, and the registers that it must not need, if there is such a way in.
    pub word: Option<(u32, u16)>,
    /// Where those come in that have the flags in both places: [`Entries::host`]?
    pub prefers_host: bool,
    /// The way in, after that of the flags, for those that know these registers to be near slots of the mirror: the usual ones, or, 16 bits
    /// above, the lowest.
    pub sure: Option<(u32, u32)>,
}

impl Entries {
    /// For those that have the flags in both places.
    pub fn both(&self) -> u32 {
        if self.prefers_host { self.host } else { self.slot }
    }

    /// The way in for those that know these registers to be near slots, if the flags need no way of their own then.
    pub fn for_sure(&self, flags: Flags, flags_dead: bool, sure: u32) -> Option<u32> {
        let fits = flags_dead || self.prefers_host && flags != Flags::Slot;
        self.sure.filter(|(_, asked)| fits && sure & asked == *asked).map(|(at, _)| at)
    }
}

/// A lowered block. Offsets count from its first byte until the cache moves them.
#[derive(Debug)]
pub struct Unit {
    /// The host code.
    pub code: Vec<u8>,
    /// Its exits; the i-th has number `first_exit + i`.
    pub exits: Vec<Exit>,
    /// Where the host may fault.
    pub points: Vec<Point>,
    /// How flags are told in blocks that this one leads to.
    pub recipes: Vec<Replay>,
    /// The ways in.
    pub entries: Entries,
    /// Guest instructions.
    pub insns: u16,
    /// Place of the displacement of its indirect branch, if that asked a fast table.
    pub jump: Option<u32>,
}

/// What lowering wants to know of its surroundings.
#[derive(Clone, Debug)]
pub struct Around {
    /// Host address the code will have.
    pub at: u64,
    /// The number of its first exit.
    pub first_exit: u32,
    /// Recipes there are already.
    pub first_recipe: u32,
    /// Host address of the way out.
    pub leave: u64,
    /// Host address of the light way out.
    pub leave_light: u64,
    /// Host address of the way to a device.
    pub port: u64,
    /// Host address of what loads the vector registers.
    pub wake: u64,
    /// Host address of what does XSAVE64.
    pub save: u64,
    /// Host address of what does XRSTOR64.
    pub restore: u64,
    /// Host address of what walks the page tables of user code.
    pub walk: u64,
    /// Are looks at the TLB that find their page counted?
    pub counts: bool,
    /// Offset of the cache of branch targets.
    pub targets: usize,
    /// Offset of the fast one, if there is one.
    pub fast: Option<usize>,
    /// Offset of the TLB.
    pub tlb: usize,
    /// May one check serve several accesses?
    pub share: bool,
    /// May a load ask for the right to store, because a store follows?
    pub foresee: bool,
    /// Did a division in it fault?
    pub divides: bool,
    /// What is known of addresses in the mirror.
    pub guess: Guess,
}

pub use mirror::Guess;
pub use usual::EARLY;

/// Code that is emitted after the block.
struct Cold {
    site: usize,
    reload: u16,
    exit: usize,
    walk: Option<Walk>,
}

/// Where a miss looks before the code is left: a register that is free, the address as a register and a displacement (none: all of it).
#[derive(Clone, Copy)]
struct Walk {
    free: Gpr,
    base: Option<Gpr>,
    disp: i64,
}

pub(super) struct Lower<'a> {
    e: Emitter,
    block: &'a GuestBlock,
    around: &'a Around,
    exits: Vec<Exit>,
    points: Vec<Point>,
    cold: Vec<Cold>,
    spilled: u16,
    /// Scratch registers of the instruction at hand.
    busy: u16,
    windows: Vec<Window>,
    flags: Flags,
    /// How the flags are told where they are not kept.
    told: Option<Told>,
    recipes: Vec<Replay>,
    /// What set them.
    producer: Option<Producer>,
    /// Constants added to registers since the version began.
    moved: [i64; 16],
    version: [u32; 16],
    /// Registers, as bits, that hold values between -2^31 and 2^32, but for small constants added.
    short: u16,
    /// What is known of registers and the usual slots of the mirror.
    sure: [Option<Sure>; 16],
    /// Sums of registers that are in them.
    sums: Vec<Sum>,
    /// Index of the instruction at hand.
    n: usize,
    /// The branch of the block to its own start, if its rounds shall keep what is known of memory.
    round: Option<usize>,
    /// Where that branch was met.
    first_round: Option<rounds::Round>,
    /// See [`Unit::jump`].
    jump: Option<u32>,
}

/// Lowers a block.
pub fn lower(block: &GuestBlock, around: &Around) -> Unit {
    lower_noting(block, around, |_| {})
}

/// As [`lower`]; tells the offsets at which the instructions' own code begins, and where the last one's ends.
pub fn lower_noting(block: &GuestBlock, around: &Around, mut note: impl FnMut(usize)) -> Unit {
    let mut l = Lower {
        e: Emitter::new(around.at),
        block,
        around,
        exits: Vec::with_capacity(8),
        points: Vec::with_capacity(8),
        cold: Vec::new(),
        spilled: block.mode.resident(),
        busy: 0,
        windows: Vec::new(),
        flags: Flags::Slot,
        told: None,
        recipes: Vec::new(),
        producer: None,
        moved: [0; 16],
        version: [0; 16],
        short: 0,
        sure: [None; 16],
        sums: Vec::new(),
        n: 0,
        round: rounds::find(block),
        first_round: None,
        jump: None,
    };
    let mut entries = l.entries();
    entries.sure = l.early();
    let mut open = true;
    while open && l.n < block.items.len() {
        let item = &block.items[l.n];
        l.busy = 0;
        note(l.e.len());
        open = l.one(item);
        l.n += 1;
    }
    note(l.e.len());
    let insns = l.n as u16;
    if open {
        let last = &block.items[block.items.len() - 1];
        l.go_to(block.next(last));
    }
    l.next_rounds();
    l.finish();
    Unit { code: l.e.bytes, exits: l.exits, points: l.points, recipes: l.recipes, entries, insns, jump: l.jump }
}

impl Lower<'_> {
    /// The ways in, by where the first instruction to care wants the flags.
    fn entries(&mut self) -> Entries {
        let mut entries = Entries::default();
        if self.block.flags_dead {
            entries.word = Some((0, 0));
            return entries;
        }
        // In the mirror accesses leave EFLAGS as they are.
        let mirrored = self.block.mode.is_mirrored() && !self.block.mode.is_counted();
        let wants_host = self.block.items.iter().find_map(|i| match i.way {
            Way::Memory | Way::Plain if mirrored => {
                i.changes_flags.then_some(true).or((i.flags_in != 0).then_some(true))
            }
            Way::Push | Way::Pop | Way::PushMemory | Way::Leave if mirrored => None,
            Way::Call if mirrored => Some(true),
            Way::Return(_) | Way::JumpIndirect | Way::CallIndirect if self.around.fast.is_some() => Some(true),
            Way::Plain | Way::Constant(_) | Way::Nop => (self.needs_flags(i)).then_some(true),
            Way::Conditional | Way::Counted | Way::Jump => Some(true),
            _ => Some(false),
        });
        if wants_host.unwrap_or(mirrored) {
            entries.prefers_host = true;
            self.restore_flags();
            entries.host = self.e.len() as u32;
            self.flags = Flags::Host;
            return entries;
        }
        self.flags = Flags::Host;
        self.save_flags();
        entries.slot = self.e.len() as u32;
        self.flags = Flags::Slot;
        if let Some(registers) = replay::changed(&self.block.items).filter(|_| !self.block.mode.is_counted()) {
            self.e.store_u32(At::slot(at::RECIPE), 0);
            entries.word = Some((self.e.len() as u32, registers));
            self.told = Some(Told::Before);
        }
        entries
    }

    /// Emits an opcode and room for a 32-bit displacement; gives the place of that.
    fn branch(&mut self, opcode: &[u8]) -> usize {
        self.e.bytes.extend_from_slice(opcode);
        let site = self.e.len();
        self.e.push_u32(0);
        site
    }

    /// Defines an exit; gives its index.
    fn exit(&mut self, kind: Kind, rip: u64, flags: Flags, done: usize) -> usize {
        let exit = Exit::new(kind, rip, self.block.mode.resident(), flags);
        self.exits.push(Exit { told: self.told, done: done as u16, sure: self.near(), ..exit });
        self.exits.len() - 1
    }

    /// Jumps out here, with registers where they are.
    fn leave_here(&mut self, item: &Item, kind: Kind) -> bool {
        let exit = self.exit(kind, self.block.rip(item), self.flags, self.n);
        self.exits[exit].spilled = self.spilled;
        self.exits[exit].native = touches_vectors(item);
        self.stub(exit);
        false
    }

    /// A conditional jump (`opcode`) out, with registers where they are.
    fn leave_if(&mut self, opcode: &[u8], item: &Item, kind: Kind, rip: u64, done: usize) {
        let site = self.branch(opcode);
        let exit = self.exit(kind, rip, Flags::Slot, done);
        self.exits[exit].spilled = self.spilled;
        self.exits[exit].native = touches_vectors(item);
        self.cold.push(Cold { site, reload: 0, exit, walk: None });
    }

    /// Has the tables of the guest walked for what an exit stands for; what follows is where the code goes on if it must be left.
    fn walk(&mut self, Walk { free, base, disp }: Walk, (len, write): (u16, bool), retry: u32) {
        match base {
            Some(r) if r == free && disp == 0 => {}
            Some(r) => self.e.lea(free, At::base(r, disp as i32)),
            None => self.e.constant(free, disp as u64),
        }
        self.e.store(At::slot(at::WALK_ADDRESS), free);
        let site = self.address_of(free);
        self.e.store(At::slot(at::WALK_WANTED), free);
        let jump = self.branch(&[0xe9]);
        self.e.set_rel32(jump, self.around.walk);
        let (from, here) = (self.e.len() as i32, self.e.here());
        self.e.set_rel32(site, here);
        wanted(len, write, retry as i32 - from).into_iter().for_each(|word| self.e.push_u32(word));
    }

    fn stub(&mut self, exit: usize) {
        self.exits[exit].stub = self.e.len() as u32;
        self.e.store_u32(At::slot(at::EXIT), self.around.first_exit + exit as u32);
        let site = self.branch(&[0xe9]);
        let Exit { kind, native, .. } = self.exits[exit];
        let light = matches!(kind, Kind::Miss { .. } | Kind::Step) && !native;
        let to = match kind {
            Kind::Port { .. } | Kind::Invalidate { .. } => self.around.port,
            _ if light => self.around.leave_light,
            _ => self.around.leave,
        };
        self.e.set_rel32(site, to);
    }

    /// Emits what was put off.
    fn finish(&mut self) {
        for i in 0..self.cold.len() {
            let Cold { site, reload, exit, walk } = self.cold[i];
            let here = self.e.here();
            self.e.set_rel32(site, here);
            self.reload(reload);
            if reload != 0 && self.exits[exit].kind == Kind::To {
                self.e.align_patch(1);
                let site = self.branch(&[0xe9]);
                self.exits[exit].site = Some(site as u32);
                let next = self.e.here();
                self.e.set_rel32(site, next);
            }
            if let (Some(walk), Kind::Miss { len, write, retry, .. }) = (walk, self.exits[exit].kind) {
                self.walk(walk, (len, write), retry);
            }
            self.stub(exit);
            if let Some(again) = self.exits[exit].again {
                self.e.set_rel32(site, self.around.at + u64::from(again));
            }
        }
    }

    /// The end of a block: everything at home, then to another.
    fn go_to(&mut self, rip: u64) {
        self.home();
        let recipe = self.leave_word();
        self.e.align_patch(1);
        let site = self.branch(&[0xe9]);
        let next = self.e.here();
        self.e.set_rel32(site, next);
        let exit = self.exit(Kind::To, rip, self.flags, self.n);
        self.exits[exit].site = Some(site as u32);
        self.exits[exit].recipe = recipe;
        self.stub(exit);
    }

    /// One instruction; false: nothing follows it.
    fn one(&mut self, item: &Item) -> bool {
        self.fetch(item);
        let before = (self.e.len(), self.exits.len(), self.cold.len(), self.points.len(), self.spilled, self.flags);
        let told = self.told;
        let windows = self.windows.clone();
        let sure = (self.sure, self.sums.clone());
        let done = match item.way {
            Way::Plain => self.plain(item),
            Way::Nop => Some(true),
            Way::Constant(v) => self.load_constant(item, v),
            Way::Memory => self.memory(item),
            Way::Push => self.push(item),
            Way::PushMemory => self.push_memory(item),
            Way::Pop => self.pop(item),
            Way::Leave => self.leave(item),
            Way::PushFlags => self.push_flags(item),
            Way::PopFlags => self.pop_flags(item),
            Way::Cli => {
                self.e.store_u32(At::slot(at::INTERRUPTS), 0);
                Some(true)
            }
            Way::ToggleAc => self.toggle_ac(item),
            // The shadow shows when it is asked for after each instruction.
            Way::Sti if self.block.mode.is_counted() => None,
            Way::Sti => Some(self.sti(item)),
            Way::ReadControl => self.read_control(item),
            Way::ReadPriority => self.read_priority(item),
            Way::WritePriority => self.write_priority(item),
            Way::ReadMsr(n) => self.read_msr(n),
            Way::WriteMsr(n) => self.write_msr(item, n),
            Way::Identify(values) => self.identify(values),
            Way::ReadSelector => self.read_selector(item),
            Way::ReadTimeAndId => self.read_time_and_id(item),
            Way::SwapGs => self.swap_gs(item),
            Way::VerifyWrite => self.verify_write(item),
            Way::ReadTime => self.read_time(item),
            way @ (Way::Stos(_) | Way::Lods(_) | Way::Movs(_)) => self.string(item, way),
            way @ (Way::RepStos(_) | Way::RepMovs(_)) => self.repeated(item, way),
            Way::Conditional => self.conditional(item),
            Way::Counted => self.counted(item),
            Way::Jump => {
                self.n += 1;
                self.go_to(item.iced.near_branch_target());
                self.n -= 1;
                Some(false)
            }
            Way::Call => self.call(item),
            Way::JumpIndirect | Way::CallIndirect => self.indirect(item),
            Way::Return(more) => self.ret(item, more),
            Way::Port => self.port(item),
            Way::Invalidate => self.invalidate(item),
            Way::Image => self.image(item),
            Way::Syscall => self.syscall(item),
            Way::Sysret => self.sysret(item),
            Way::Iret => self.iret(item),
            Way::Asleep => Some(self.leave_here(item, Kind::Asleep)),
            Way::Step => None,
        };
        match done {
            Some(open) => {
                self.effects(item);
                open
            }
            None => {
                // What could not be emitted to its end leaves no trace.
                self.e.bytes.truncate(before.0);
                self.exits.truncate(before.1);
                self.cold.truncate(before.2);
                self.points.truncate(before.3);
                (self.spilled, self.flags, self.windows) = (before.4, before.5, windows);
                (self.sure, self.sums) = sure;
                self.told = told;
                self.leave_here(item, Kind::Step)
            }
        }
    }

    fn plain(&mut self, item: &Item) -> Option<bool> {
        self.check_divisor(item, None);
        self.flags_for(item)?;
        let block = self.block;
        let from = self.e.len();
        if block.mode.is_narrow() {
            self.e.bytes.extend_from_slice(&narrow::encode(&item.iced)?);
        } else {
            self.e.bytes.extend_from_slice(block.code(item));
        }
        self.point(item, from);
        Some(true)
    }

    fn load_constant(&mut self, item: &Item, v: u64) -> Option<bool> {
        let r = Gpr::from_iced(item.iced.op0_register())?;
        self.e.constant(r, v);
        Some(true)
    }

    /// The host may fault in what was emitted since `from`.
    fn point(&mut self, item: &Item, from: usize) {
        self.point_at(item, from, None);
    }

    fn point_at(&mut self, item: &Item, from: usize, access: Option<Access>) {
        let (from, to) = (from as u32, self.e.len() as u32);
        self.points.push(Point {
            from,
            to,
            at: item.at,
            done: self.n as u16,
            spilled: self.spilled,
            flags: self.flags,
            told: self.told,
            divides: matches!(item.iced.mnemonic(), Mnemonic::Div | Mnemonic::Idiv),
            access,
            fop: if self.block.mode.is_narrow() { narrow::fop(item, self.block.code(item)) } else { 0 },
            checks: None,
        });
    }

    /// What the instruction did to registers and flags.
    fn effects(&mut self, item: &Item) {
        let inherited = self.inherited(item);
        for r in Gpr::ALL {
            let bit = 1 << r as u16;
            if item.writes & bit == 0 {
                continue;
            }
            self.spilled &= !bit;
            self.follow_short(item, r);
            match item.adds {
                Some((a, n)) if a == r => self.moved[r as usize] += n,
                _ => {
                    self.windows.retain(|w| w.delta != r);
                    self.version[r as usize] += 1;
                    self.moved[r as usize] = 0;
                    self.windows.retain(|w| w.base != Some(r) && w.index.is_none_or(|(i, _)| i != r));
                    self.sure[r as usize] = None;
                    self.sums.retain(|s| !s.of(r));
                }
            }
        }
        if let Some((r, sure)) = inherited {
            self.sure[r as usize] = Some(sure);
        }
        if matches!(item.way, Way::Plain | Way::Memory) && item.changes_flags {
            self.flags = Flags::Host;
            self.produced(item);
        }
    }

    fn needs_flags(&self, item: &Item) -> bool {
        item.flags_in != 0 || item.changes_flags && item.shown & !item.flags_out != 0
    }

    /// Puts the flags into EFLAGS if the instruction wants them there.
    fn flags_for(&mut self, item: &Item) -> Option<()> {
        if self.flags == Flags::Slot && self.needs_flags(item) {
            self.restore_flags();
        }
        Some(())
    }

    /// Do status flags matter before the instruction is done? Where instructions are counted each one's are shown exactly.
    fn flags_live(&self, item: &Item) -> bool {
        if self.block.mode.is_counted() {
            return true;
        }
        let live = match item.way {
            Way::Plain | Way::Memory => item.live & !item.flags_out | item.flags_in,
            Way::PushFlags | Way::PopFlags | Way::Step | Way::Sti | Way::VerifyWrite => STATUS,
            way if way.ends() => STATUS,
            _ => item.live,
        };
        live != 0
    }
}

/// Does the interpreter need the XSAVE image for it?
fn touches_vectors(item: &Item) -> bool {
    facts(item.iced.code()).class == Class::Native
}
