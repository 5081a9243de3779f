//! Runs code on the host CPU with a given register state, memory operands and all, and reports what it left or which signal it got.
#![allow(unsafe_code)]

use bivisor_emulator::cpu::XsaveArea;
use bivisor_emulator::host::{signal, thread::ThreadBlock};
use iced_x86::{Code, Encoder, Instruction, MemoryOperand, Register};
use std::cell::Cell;

/// A page of code, room for state, and a window of data: two accessible pages and one that is not.
pub struct Host {
    base: *mut u8,
    enter_len: usize,
}

/// Registers in and out.
#[repr(C, align(64))]
pub struct State {
    pub gpr: [u64; 16],
    pub rflags: u64,
    host_rsp: u64,
    pub xsave: XsaveArea,
    after: XsaveArea,
}

/// How the code ended: by itself, or with a signal and the address in it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum End {
    Done,
    Signal(i32, u64),
}

const CODE: usize = 0;
const STATE: usize = 4096;
const DATA: usize = STATE + 3 * 4096;
pub const DATA_LEN: usize = 2 * 4096;
const SIZE: usize = DATA + DATA_LEN + 4096;

thread_local! {
    static EXIT: Cell<u64> = const { Cell::new(0) };
    static SIGNAL: Cell<Option<(i32, u64)>> = const { Cell::new(None) };
    static RANGE: Cell<(u64, u64)> = const { Cell::new((0, 0)) };
}

unsafe fn hook(_: &ThreadBlock, sig: i32, info: *mut libc::siginfo_t, uc: *mut libc::ucontext_t) -> bool {
    // SAFETY: the handler's arguments.
    unsafe {
        let rip = (*uc).uc_mcontext.gregs[signal::REG_RIP] as u64;
        let (start, end) = RANGE.get();
        if !(start..end).contains(&rip) {
            return false;
        }
        SIGNAL.set(Some((sig, (*info).si_addr() as u64)));
        (*uc).uc_mcontext.gregs[signal::REG_RIP] = EXIT.get() as i64;
        true
    }
}

fn assemble(list: &[Instruction], rip: u64) -> Vec<u8> {
    let mut e = Encoder::new(64);
    let mut at = rip;
    for i in list {
        at += e.encode(i, at).expect("encodes") as u64;
    }
    e.take_buffer()
}

fn field(base: Register, offset: usize) -> MemoryOperand {
    MemoryOperand::with_base_displ(base, offset as i64)
}

const CALLEE: [Register; 6] =
    [Register::RBX, Register::RBP, Register::R12, Register::R13, Register::R14, Register::R15];

impl Host {
    pub fn new() -> Host {
        signal::attach().engine_hook.set(Some(hook));
        // SAFETY: fresh mappings.
        let base = unsafe {
            let p = libc::mmap(std::ptr::null_mut(), SIZE, 7, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS, -1, 0);
            assert!(p != libc::MAP_FAILED);
            libc::mprotect(p.add(DATA + DATA_LEN), 4096, libc::PROT_NONE);
            p.cast::<u8>()
        };
        let mut h = Host { base, enter_len: 0 };
        h.enter_len = h.put_enter();
        h
    }

    /// The state; stays at its address.
    pub fn state(&mut self) -> &mut State {
        // SAFETY: mapped, aligned, exclusive by &mut self; all bit patterns are valid.
        unsafe { &mut *self.base.add(STATE).cast::<State>() }
    }

    /// The data window, accessible part.
    pub fn data(&mut self) -> &mut [u8] {
        // SAFETY: mapped, exclusive by &mut self.
        unsafe { std::slice::from_raw_parts_mut(self.base.add(DATA), DATA_LEN) }
    }

    pub fn data_address(&self) -> u64 {
        self.base as u64 + DATA as u64
    }

    /// Where the tested code lies.
    pub fn code_address(&self) -> u64 {
        self.base as u64 + CODE as u64 + self.enter_len as u64
    }

    fn put_enter(&mut self) -> usize {
        let rdi = Register::RDI;
        let mut list: Vec<Instruction> = Vec::new();
        let push = |r| Instruction::with1(Code::Push_r64, r).expect("push");
        list.extend(CALLEE.map(push));
        let mov = |r, m| Instruction::with2(Code::Mov_r64_rm64, r, m).expect("mov");
        list.push(
            Instruction::with2(Code::Mov_rm64_r64, field(rdi, std::mem::offset_of!(State, host_rsp)), Register::RSP)
                .expect("mov"),
        );
        list.push(Instruction::with2(Code::Mov_r32_imm32, Register::EAX, -1i32).expect("mov"));
        list.push(Instruction::with2(Code::Mov_r32_imm32, Register::EDX, -1i32).expect("mov"));
        let xsave = field(rdi, std::mem::offset_of!(State, xsave));
        list.push(Instruction::with1(Code::Xrstor64_mem, xsave).expect("xrstor"));
        list.push(Instruction::with1(Code::Push_rm64, field(rdi, std::mem::offset_of!(State, rflags))).expect("push"));
        list.push(Instruction::with(Code::Popfq));
        for n in (0..16).filter(|&n| n != 7) {
            list.push(mov(Register::RAX + n, field(rdi, 8 * n as usize)));
        }
        list.push(mov(rdi, field(rdi, 8 * 7)));
        let bytes = assemble(&list, self.base as u64);
        self.write(CODE, &bytes);
        bytes.len()
    }

    fn write(&mut self, at: usize, bytes: &[u8]) {
        // SAFETY: in the code page.
        unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), self.base.add(at), bytes.len()) };
    }

    /// Puts the tested code in its place, with the way out after it.
    pub fn load(&mut self, code: &[u8]) {
        let state = self.base as u64 + STATE as u64;
        let at = CODE + self.enter_len;
        self.write(at, code);
        let rax = Register::RAX;
        let mut list = vec![
            // The only way to store a register to a known address without another one.
            Instruction::with2(Code::Mov_moffs64_RAX, MemoryOperand::with_displ(state, 8), rax).expect("mov"),
            Instruction::with2(Code::Mov_r64_imm64, rax, state).expect("mov"),
        ];
        let store = |m, r| Instruction::with2(Code::Mov_rm64_r64, m, r).expect("mov");
        for n in 1..16 {
            list.push(store(field(rax, 8 * n as usize), Register::RAX + n));
        }
        list.push(
            Instruction::with2(Code::Mov_r64_rm64, Register::RSP, field(rax, std::mem::offset_of!(State, host_rsp)))
                .expect("mov"),
        );
        list.push(Instruction::with(Code::Pushfq));
        list.push(Instruction::with1(Code::Pop_rm64, field(rax, std::mem::offset_of!(State, rflags))).expect("pop"));
        list.push(Instruction::with2(Code::Mov_r64_rm64, Register::RDI, rax).expect("mov"));
        list.push(Instruction::with2(Code::Mov_r32_imm32, Register::EAX, -1i32).expect("mov"));
        list.push(Instruction::with2(Code::Mov_r32_imm32, Register::EDX, -1i32).expect("mov"));
        let after = field(Register::RDI, std::mem::offset_of!(State, after));
        list.push(Instruction::with1(Code::Xsave64_mem, after).expect("xsave"));
        list.push(Instruction::with(Code::Fninit));
        if std::is_x86_feature_detected!("avx") {
            list.push(Instruction::with(Code::VEX_Vzeroupper));
        }
        list.push(
            Instruction::with2(Code::Mov_rm32_imm32, field(Register::RSP, 0usize.wrapping_sub(8)), 0x1f80)
                .expect("mov"),
        );
        list.push(
            Instruction::with1(Code::Ldmxcsr_m32, field(Register::RSP, 0usize.wrapping_sub(8))).expect("ldmxcsr"),
        );
        list.extend(CALLEE.iter().rev().map(|&r| Instruction::with1(Code::Pop_r64, r).expect("pop")));
        list.push(Instruction::with(Code::Cld));
        list.push(Instruction::with(Code::Retnq));
        let out = at + code.len();
        let bytes = assemble(&list, self.base as u64 + out as u64);
        self.write(out, &bytes);
        EXIT.set(self.base as u64 + out as u64);
        RANGE.set((self.code_address(), self.code_address() + code.len() as u64));
    }

    /// Runs the loaded code on the state, which is replaced by what it left.
    pub fn run(&mut self) -> End {
        SIGNAL.set(None);
        let base = self.base;
        let s = self.state();
        s.after.bytes.fill(0);
        // SAFETY: the code keeps callee-saved registers, RSP and the control words; signals go to the alternate stack.
        unsafe {
            let f: extern "sysv64" fn(*mut State) = std::mem::transmute(base.add(CODE));
            f(s);
        }
        s.xsave = s.after.clone();
        SIGNAL.take().map_or(End::Done, |(sig, addr)| End::Signal(sig, addr))
    }
}
