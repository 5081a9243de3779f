//! The native unit of a virtual CPU: thunks by instruction, and who has the x87 state.

use crate::cpu::{CpuModel, CpuState, XsaveArea};
use crate::native::code::{CodeBuffer, Entry};
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

const FAST: usize = 1024;

/// The native unit of one virtual CPU.
#[derive(Default)]
pub struct NativeUnit {
    buffer: Option<CodeBuffer>,
    thunks: HashMap<Key, Option<Thunk>>,
    /// In front of the map: direct-mapped.
    fast: Vec<(Key, Option<Thunk>)>,
    bounce: Box<Bounce>,
    /// The host's x87 registers hold the guest's state.
    live: bool,
    /// While live: may FSW.ES be set?
    unmasked: bool,
    pointers: Pointers,
    /// The processor's own pointers are those of thunks, and `pointers` stands for them: of the code, of the data.
    noted: (bool, bool),
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

fn slot(k: &Key) -> usize {
    let h = (k[0] ^ k[1].rotate_left(29)).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    (h >> 54) as usize % FAST
}

impl NativeUnit {
    /// The thunk of an instruction, made at its first use. `None`: the host cannot run it so.
    #[inline]
    pub fn thunk(&mut self, i: &Instruction) -> Option<Thunk> {
        let key = key(i);
        if let Some((k, t)) = self.fast.get(slot(&key))
            && *k == key
        {
            return *t;
        }
        self.find(key, i)
    }

    #[cold]
    fn find(&mut self, key: Key, i: &Instruction) -> Option<Thunk> {
        if self.fast.is_empty() {
            self.fast.resize(FAST, ([u64::MAX; 2], None));
        }
        let found = match self.thunks.get(&key) {
            Some(t) => *t,
            None => {
                let made = self.make(i);
                self.thunks.insert(key, made);
                made
            }
        };
        self.fast[slot(&key)] = (key, found);
        found
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
                self.thunks.clear();
                self.fast.clear();
                let entry = buffer.add(&built.code)?;
                self.fast.resize(FAST, ([u64::MAX; 2], None));
                entry
            }
        };
        let element = match i.code().op_code().broadcast_memory_size().size() {
            0 => i.memory_size().element_size(),
            n => n,
        };
        Some(Thunk {
            needs,
            len: i.memory_size().size().min(size_of::<Bounce>()) as u8,
            element: element as u8,
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

    /// Runs it on the registers of `cpu`. False: an unmasked SIMD exception, of which MXCSR is set and nothing else changed; the
    /// calling thread must then have the handler of [`crate::host::signal`], and [`NativeUnit::code`] published to it.
    #[inline]
    pub fn run(&mut self, t: &Thunk, cpu: &mut CpuState) -> bool {
        let image = &mut cpu.xsave;
        let missing = (t.touched | t.written) & !image.xstate_bv();
        if missing != 0 {
            image.materialize(missing & !t.written);
            image.activate(missing & t.written);
        }
        let Some(buffer) = &self.buffer else { return true };
        let done = buffer.call(t.entry, cpu, &mut self.bounce);
        if !done {
            let raw = u32::from_le_bytes(self.bounce.data[..4].try_into().expect("four bytes"));
            cpu.xsave.set_mxcsr(raw);
        } else if t.needs.contains(Needs::FCW) {
            self.unmasked = self.bounce.fcw & EXCEPTIONS != EXCEPTIONS;
            if t.needs.contains(Needs::LOAD) && t.len > 2 {
                // FLDENV, FRSTOR: the pointers are those in memory.
                self.noted = (false, false);
            }
        }
        done
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
        if image.fdp() == self.operand().as_ptr() as u64 {
            image.set_fdp(self.pointers.fdp);
        }
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

    /// Replaces addresses of ours by the guest's in a 32-bit x87 environment that FNSTENV or FNSAVE left in the buffer.
    pub fn patch_environment(&mut self, wide: bool) {
        let p = self.pointers;
        let (code, data) = (self.code(), self.operand().as_ptr() as u64);
        let noted = self.noted;
        let b = self.operand();
        if !wide {
            let half = |b: &[u8], n: usize| u16::from_le_bytes([b[n], b[n + 1]]);
            if noted.0 && (half(b, 6) != 0 || half(b, 8) != 0) {
                b[6..8].copy_from_slice(&(p.fip as u16).to_le_bytes());
                b[8..10].copy_from_slice(&p.fcs.to_le_bytes());
            }
            if noted.1 && (half(b, 10) != 0 || half(b, 12) != 0) {
                b[10..12].copy_from_slice(&(p.fdp as u16).to_le_bytes());
                b[12..14].copy_from_slice(&p.fds.to_le_bytes());
            }
            return;
        }
        let word = |b: &[u8], n: usize| u32::from_le_bytes([b[n], b[n + 1], b[n + 2], b[n + 3]]);
        if (code.start as u32..code.end as u32).contains(&word(b, 12)) {
            b[12..16].copy_from_slice(&(p.fip as u32).to_le_bytes());
            let selector = if b[16..18] == [0, 0] { 0 } else { p.fcs };
            b[16..18].copy_from_slice(&selector.to_le_bytes());
            if b[18..20] != [0, 0] {
                b[18..20].copy_from_slice(&p.fop.to_le_bytes());
            }
        }
        if word(b, 20) == data as u32 {
            b[20..24].copy_from_slice(&(p.fdp as u32).to_le_bytes());
            let selector = if b[24..26] == [0, 0] { 0 } else { p.fds };
            b[24..26].copy_from_slice(&selector.to_le_bytes());
        }
    }
}
