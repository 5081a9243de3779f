//! A small machine for unit tests: 2 MiB of RAM, mapped one to one for everybody, code at [`CODE`], a stack below [`STACK`].

use crate::bus::EmptyBus;
use crate::cpu::CpuState;
use crate::interp::Interpreter;
use crate::isa::{Gpr, Width};
use crate::mem::{GuestMemory, Ram};
use crate::vcpu::{Board, Exit, Intercepts, Vcpu};

/// Where the code is.
pub const CODE: u64 = 0x8000;
/// The stack pointer at the start.
pub const STACK: u64 = 0x2_0000;
/// Room for data.
pub const DATA: u64 = 0x1_0000;
/// Level-4 table, level-3 at +0x1000, level-2 at +0x2000.
pub const TABLES: u64 = 0x1000;

/// CPU and memory of a test.
pub struct Machine {
    /// The engine; exceptions are intercepted.
    pub vcpu: Interpreter,
    /// RAM.
    pub mem: GuestMemory,
}

impl Machine {
    /// 64-bit mode at the given privilege level with `code` loaded.
    pub fn long64(cpl: u8, code: &[u8]) -> Machine {
        let mem = GuestMemory::Ram(Ram::new(2 << 20).expect("2 MiB"));
        for (at, entry) in [(TABLES, TABLES + 0x1007), (TABLES + 0x1000, TABLES + 0x2007), (TABLES + 0x2000, 0x87u64)] {
            mem.store(at, Width::Q, entry).expect("inside RAM");
        }
        mem.write(CODE, code).expect("inside RAM");
        let mut vcpu = Interpreter::default();
        vcpu.set_intercepts(Intercepts::EXCEPTIONS);
        let mut state = CpuState::long64(cpl);
        state.cr3 = TABLES;
        state.rip = CODE;
        state.gpr[Gpr::Rsp as usize] = STACK;
        *vcpu.state() = state;
        Machine { vcpu, mem }
    }

    /// Real mode, segments 0, with `code` loaded.
    pub fn real(code: &[u8]) -> Machine {
        let mut m = Machine::long64(0, code);
        let mut state = CpuState::reset();
        state.seg = [crate::cpu::Segment::real(0); 6];
        state.rip = CODE;
        state.gpr[Gpr::Rsp as usize] = 0x7000;
        *m.vcpu.state() = state;
        m
    }

    /// The registers.
    pub fn cpu(&mut self) -> &mut CpuState {
        self.vcpu.state()
    }

    /// Runs `n` instructions.
    pub fn run(&mut self, n: u64) -> Exit {
        self.vcpu.run(Board { mem: &self.mem, bus: &EmptyBus }, n)
    }

    /// Loads from RAM.
    pub fn load(&self, at: u64, w: Width) -> u64 {
        self.mem.load(at, w).expect("inside RAM")
    }
}

#[test]
fn a_nop_moves_rip() {
    let mut m = Machine::long64(3, &[0x90]);
    assert_eq!(m.run(1), Exit::Budget);
    assert_eq!(m.cpu().rip, CODE + 1);
}
