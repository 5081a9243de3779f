//! The native unit of a virtual CPU: thunks by instruction, and who has the x87 state.

use crate::cpu::xsave::component;
use crate::cpu::{CpuModel, CpuState, XsaveArea};
use crate::host::probe::Reach;
use crate::host::signal;
use crate::isa::Insn;
use crate::native::code::{CodeBuffer, Entry, Ran};
use crate::native::kind::{self, Needs};
use crate::native::{Bounce, thunk, x87};
use iced_x86::{Instruction, OpKind, Register};
use std::collections::HashMap;
use std::ops::Range;
use std::sync::OnceLock;

/// x87 exception bits of FCW and FSW.
const EXCEPTIONS: u16 = 0x3f;
/// FSW.ES: an unmasked exception is pending.
const ES: u16 = 1 << 7;

/// An instruction made ready to run.
#[derive(Clone, Copy, Debug)]
pub struct Thunk {
    /// What to check and do around it.
    pub needs: Needs,
    /// Bytes of the memory operand, 0 if there is none.
    pub len: u8,
    /// Bytes of one element of a masked memory operand.
    pub element: u8,
    /// The x87 opcode as FOP has it; without the addressing form of a memory operand.
    pub opcode: u16,
    /// State components it reads or changes partly.
    touched: u64,
    /// State components in use afterwards.
    written: u64,
    entry: Entry,
}

/// The x87 instruction and operand pointers, which the processor keeps for exception handlers (SDM 1 8.1.8).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Pointers {
    /// Address of the last non-control instruction.
    pub fip: u64,
    /// Its code segment.
    pub fcs: u16,
    /// Address of the last memory operand.
    pub fdp: u64,
    /// Its segment.
    pub fds: u16,
    /// Opcode of the last non-control instruction, 11 bits.
    pub fop: u16,
}

/// Everything a thunk depends on: code, registers, immediates, mask and rounding, but not the address of the memory operand.
type Key = [u64; 2];

/// An instruction met, and its thunk once it was needed: `Some(None)` if it has none.
struct Slot {
    iced: Instruction,
    thunk: Option<Option<Thunk>>,
}

/// Instructions kept without a number, when all numbers are given away.
const LOOSE: usize = 4096;

/// The native unit of one virtual CPU.
#[derive(Default)]
pub struct NativeUnit {
    buffer: Option<CodeBuffer>,
    /// By number; the first one is number 1.
    slots: Vec<Slot>,
    numbers: HashMap<Key, u16>,
    loose: HashMap<Key, Option<Thunk>>,
    /// The calling thread knows where thunks are, so that they may fault.
    announced: bool,
    bounce: Box<Bounce>,
    /// The host's x87 registers hold the guest's state.
    live: bool,
    /// While live: may FSW.ES be set?
    unmasked: bool,
    pointers: Pointers,
    /// The processor's own pointers are those of thunks, and `pointers` stands for them: of the code, of the data.
    noted: (bool, bool),
    /// Room for an image on its way to or from memory; its content means nothing.
    area: Option<Box<XsaveArea>>,
}

/// Makes the bytes of components meaningful that are in their initial configuration.
#[cold]
fn prepare(image: &mut XsaveArea, missing: u64, written: u64) {
    image.materialize(missing & !written);
    image.activate(missing & written);
}

fn key(i: &Instruction) -> Key {
    let r = |n: Register| n as u64;
    let mut k = i.code() as u64;
    k |= r(i.op0_register()) << 16 | r(i.op1_register()) << 24 | r(i.op2_register()) << 32 | r(i.op3_register()) << 40;
    k |= r(i.op_mask()) << 48;
    k |= (i.zeroing_masking() as u64) << 56 | (i.suppress_all_exceptions() as u64) << 57;
    k |= (i.rounding_control() as u64) << 58 | (i.is_broadcast() as u64) << 61;
    let mut m = 0;
    for n in 0..i.op_count() {
        m |= match i.op_kind(n) {
            OpKind::Memory => 1 << (32 + n),
            OpKind::Immediate8 => u64::from(i.immediate8()),
            OpKind::Immediate8_2nd => u64::from(i.immediate8_2nd()) << 8,
            _ => 0,
        };
    }
    if i.op_count() > 4 {
        m |= r(i.op4_register()) << 16;
    }
    [k, m]
}

impl NativeUnit {
    /// The number of an instruction, for [`Insn::hint`]; 0 if there is none left.
    pub fn intern(&mut self, i: &Instruction) -> u16 {
        let key = key(i);
        if let Some(&n) = self.numbers.get(&key) {
            return n;
        }
        let Ok(n) = u16::try_from(self.slots.len() + 1) else { return 0 };
        self.slots.push(Slot { iced: *i, thunk: None });
        self.numbers.insert(key, n);
        n
    }

    /// The thunk of an instruction, made at its first use. `None`: the host cannot run it so.
    #[inline(always)]
    pub fn thunk(&mut self, i: &Insn) -> Option<Thunk> {
        if let Some(slot) = self.slots.get(usize::from(i.hint).wrapping_sub(1))
            && let Some(thunk) = slot.thunk
        {
            return thunk;
        }
        self.find(i)
    }

    #[cold]
    #[inline(never)]
    fn find(&mut self, i: &Insn) -> Option<Thunk> {
        let n = if i.hint == 0 { self.intern(&i.iced) } else { i.hint };
        if let Some(slot) = self.slots.get(usize::from(n).wrapping_sub(1)) {
            let (iced, known) = (slot.iced, slot.thunk);
            return known.unwrap_or_else(|| {
                let made = self.make(&iced);
                self.slots[usize::from(n) - 1].thunk = Some(made);
                made
            });
        }
        let key = key(&i.iced);
        if let Some(thunk) = self.loose.get(&key) {
            return *thunk;
        }
        if self.loose.len() >= LOOSE {
            self.loose.clear();
        }
        let made = self.make(&i.iced);
        self.loose.insert(key, made);
        made
    }

    /// Forgets all thunks, to make room.
    fn flush(&mut self) {
        self.slots.iter_mut().for_each(|s| s.thunk = None);
        self.loose.clear();
    }

    fn make(&mut self, i: &Instruction) -> Option<Thunk> {
        static HOST: OnceLock<CpuModel> = OnceLock::new();
        if !HOST.get_or_init(CpuModel::host).supports(i.code()) {
            return None;
        }
        let needs = kind::needs(i);
        let built = thunk::build(i, needs)?;
        if self.buffer.is_none() {
            self.buffer = CodeBuffer::new();
        }
        let buffer = self.buffer.as_mut()?;
        let entry = match buffer.add(&built.code) {
            Some(entry) => entry,
            None => {
                // Full: begin anew.
                buffer.clear();
                let entry = buffer.add(&built.code)?;
                self.flush();
                entry
            }
        };
        Some(Thunk {
            needs,
            len: i.memory_size().size().min(size_of::<Bounce>()) as u8,
            element: kind::element_size(i) as u8,
            opcode: if needs.contains(Needs::POINTERS) { kind::x87_opcode(i) } else { 0 },
            touched: built.touched,
            written: built.written,
            entry,
        })
    }

    /// The buffer that stands for the memory operand.
    #[inline(always)]
    pub fn operand(&mut self) -> &mut [u8; 128] {
        &mut self.bounce.data
    }

    /// Runs it on the registers of `cpu`, with its memory operand in the buffer or at `operand`. Where a fault can come of it, the
    /// unit was told so by [`NativeUnit::announce`].
    #[inline(always)]
    pub fn run(&mut self, t: &Thunk, cpu: &mut CpuState, operand: Option<Reach>) -> Ran {
        let image = &mut cpu.xsave;
        let missing = (t.touched | t.written) & !image.xstate_bv();
        if missing != 0 {
            prepare(image, missing, t.written);
        }
        let Some(buffer) = &self.buffer else { return Ran::Fault };
        let ran = buffer.call(t.entry, cpu, &mut self.bounce, operand);
        if ran == Ran::Exception {
            let raw = u32::from_le_bytes(self.bounce.data[..4].try_into().expect("four bytes"));
            cpu.xsave.set_mxcsr(raw);
        } else if t.needs.contains(Needs::FCW) && ran == Ran::Done {
            self.unmasked = self.bounce.fcw & EXCEPTIONS != EXCEPTIONS;
            if t.len != 2 && !t.needs.contains(Needs::ENVIRONMENT) {
                // FLDENV, FRSTOR: the pointers are those in memory. FNINIT: they are zero.
                self.noted = (false, false);
            }
        }
        ran
    }

    /// Tells the calling thread's signal handler that thunks may fault, until the end of the run.
    #[inline(always)]
    pub fn announce(&mut self) {
        if !self.announced {
            signal::expect_faults(self.code());
            self.announced = true;
        }
    }

    /// The end of a run: whatever is in host registers goes to the image.
    #[inline(always)]
    pub fn leave(&mut self, image: &mut XsaveArea) {
        self.leave_x87(image);
        if self.announced {
            signal::expect_faults(0..0);
            self.announced = false;
        }
    }

    /// Host addresses of the thunks.
    pub fn code(&self) -> Range<u64> {
        self.buffer.as_ref().map_or(0..0, CodeBuffer::range)
    }

    /// Takes the x87 state of `image` into the host's registers, before a thunk that needs it.
    #[inline(always)]
    pub fn enter_x87(&mut self, image: &mut XsaveArea) {
        if !self.live {
            self.load_x87(image);
        }
    }

    #[cold]
    fn load_x87(&mut self, image: &mut XsaveArea) {
        x87::load(image);
        self.live = true;
        self.noted = (false, false);
        self.unmasked = image.fcw() & EXCEPTIONS != EXCEPTIONS;
        self.pointers = Pointers { fip: image.fip(), fdp: image.fdp(), fop: image.fop(), fcs: 0, fds: 0 };
    }

    /// May an x87 exception be unmasked?
    #[inline(always)]
    pub fn x87_unmasked(&self) -> bool {
        self.unmasked
    }

    /// Is an unmasked x87 exception pending? Only while the unit has the state.
    #[inline(always)]
    pub fn x87_pending(&self) -> bool {
        self.unmasked && x87::status() & ES != 0
    }

    /// Notes the guest's pointers of the non-control instruction that just ran; its memory operand if it has one.
    #[inline(always)]
    pub fn set_pointers(&mut self, fip: u64, fcs: u16, fop: u16, data: Option<(u64, u16)>) {
        (self.pointers.fip, self.pointers.fcs, self.pointers.fop) = (fip, fcs, fop);
        self.noted.0 = true;
        if let Some((fdp, fds)) = data {
            self.noted.1 = true;
            (self.pointers.fdp, self.pointers.fds) = (fdp, fds);
        }
    }

    /// The guest's pointers.
    pub fn pointers(&self) -> Pointers {
        self.pointers
    }

    /// Sets the selectors of the pointers, which the 64-bit image does not have.
    pub fn set_selectors(&mut self, fcs: u16, fds: u16) {
        (self.pointers.fcs, self.pointers.fds) = (fcs, fds);
    }

    /// Brings the image up to date; the unit keeps the state.
    #[inline(always)]
    pub fn sync_x87(&mut self, image: &mut XsaveArea) {
        if self.live {
            self.save_x87(image);
        }
    }

    #[cold]
    fn save_x87(&mut self, image: &mut XsaveArea) {
        x87::save(image);
        // What the processor noted are addresses of ours: the guest's stand for them.
        if self.code().contains(&image.fip()) {
            image.set_fip(self.pointers.fip);
            if image.fop() != 0 {
                image.set_fop(self.pointers.fop);
            }
        }
        if self.noted.1 && image.fdp() != 0 {
            image.set_fdp(self.pointers.fdp);
        }
    }

    /// Room for an image, whatever is in it: XSAVE and XRSTOR would spend their time on clearing it.
    #[inline]
    pub fn take_area(&mut self) -> Box<XsaveArea> {
        self.area.take().unwrap_or_default()
    }

    /// The room is free again.
    #[inline]
    pub fn give_area(&mut self, area: Box<XsaveArea>) {
        self.area = Some(area);
    }

    /// The x87 state becomes the initial one.
    pub fn reset_x87(&mut self, image: &mut XsaveArea) {
        if std::mem::take(&mut self.live) {
            x87::clean();
        }
        image.set_xstate_bv(image.xstate_bv() & !component::X87);
        self.pointers = Pointers::default();
    }

    /// Gives the state back to the image, at the end of a run and before code that changes the image.
    #[inline(always)]
    pub fn leave_x87(&mut self, image: &mut XsaveArea) {
        if self.live {
            self.save_x87(image);
            x87::clean();
            self.live = false;
        }
    }

    /// Puts the guest's pointers into the environment of `len` bytes that FNSTENV or FNSAVE left in the buffer. The processor's own
    /// are those of thunks, or lost: AMD's do not survive a switch of threads.
    pub fn patch_environment(&mut self, len: usize) {
        let (p, noted) = (self.pointers, self.noted);
        let amd = kind::is_amd();
        let b = self.operand();
        // SDM 1 figures 8-9 and 8-11: control, status, tag, then FIP, FCS with the opcode, FDP, FDS in words or doublewords.
        let size = if matches!(len, 14 | 94) { 2 } else { 4 };
        // Where FOP and FDP are noted for unmasked exceptions only (SDM 1 8.1.9; CPUID leaf 7, FDP_EXCPTN_ONLY) the image has 0 of others.
        let has_fop = size == 4 && (b[18], b[19] & 7) != (0, 0);
        let has_fdp = b[5 * size..6 * size].iter().any(|byte| *byte != 0);
        let mut put = |n: usize, v: u64| b[n * size..(n + 1) * size].copy_from_slice(&v.to_le_bytes()[..size]);
        if noted.0 {
            put(3, p.fip);
            let opcode = if size == 4 && (amd || has_fop) { u64::from(p.fop) << 16 } else { 0 };
            put(4, u64::from(if amd { p.fcs } else { 0 }) | opcode);
        }
        if noted.1 && (amd || has_fdp) {
            put(5, p.fdp);
            let unused = if size == 4 { 0xffff_0000 } else { 0 };
            put(6, u64::from(if amd { p.fds } else { 0 }) | unused);
        }
        if len > 28 {
            // FNSAVE clears them.
            self.noted = (false, false);
        }
    }
}
