//! placeholder
use crate::run::KvmVcpu;
use bivisor_emulator::cpu::CpuState;
use bivisor_emulator::mem::Ram;
use bivisor_emulator::vcpu::{Board, Exit};
pub(crate) struct Machine;
impl Machine {
    pub fn fetch(&mut self, _: &mut CpuState) -> std::io::Result<()> {
        Ok(())
    }
}
impl KvmVcpu {
    pub(crate) fn run_machine(&mut self, _: Board<'_>, _: &Ram, _: u64) -> Exit {
        self.unsupported("not yet")
    }
}
