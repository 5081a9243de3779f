//! The task-state segment: stacks of inner privilege levels, interrupt stacks, the I/O permission map (SDM 3A 7.2.1, 7.7; SDM 1 19.5.2).
//! The switch of tasks is in [`super::switch`].

use crate::cpu::descriptor::{kind, selector_error};
use crate::cpu::{CpuState, Fault};
use crate::interp::sensitive::selector::{is_ia32e, linear_in_table};
use crate::interp::{Exec, Stop, access};
use crate::isa::Width;

/// The error code that names the current TSS.
fn tr_error(cpu: &CpuState) -> u16 {
    selector_error(cpu.tr.selector)
}

/// Reads a field; `#TS(TR selector)` if it lies beyond the limit.
fn field(x: &mut Exec<'_>, offset: u64, w: Width) -> Result<u64, Stop> {
    if offset + w.bytes() - 1 > u64::from(x.cpu.tr.limit) {
        return Err(Fault::Ts(tr_error(x.cpu)).into());
    }
    let laddr = linear_in_table(x.cpu, x.cpu.tr.base.wrapping_add(offset));
    access::load_system(x, laddr, w)
}

/// RSP of a privilege level, from a 64-bit TSS.
///
/// # Errors
/// #TS(TR selector) beyond the limit; #PF.
pub fn rsp(x: &mut Exec<'_>, cpl: u8) -> Result<u64, Stop> {
    field(x, 4 + 8 * u64::from(cpl & 3), Width::Q)
}

/// An entry of the interrupt stack table, 1 to 7, from a 64-bit TSS.
///
/// # Errors
/// #TS(TR selector) beyond the limit; #PF.
pub fn ist(x: &mut Exec<'_>, n: u8) -> Result<u64, Stop> {
    field(x, 0x1c + 8 * u64::from(n & 7), Width::Q)
}

/// SS and ESP (SP) of a privilege level, from a 32-bit (16-bit) TSS.
///
/// # Errors
/// #TS(TR selector) beyond the limit; #PF.
pub fn stack(x: &mut Exec<'_>, cpl: u8) -> Result<(u16, u64), Stop> {
    let level = u64::from(cpl & 3);
    if matches!(x.cpu.tr.attr.kind(), kind::TSS16_AVAILABLE | kind::TSS16_BUSY) {
        let sp = field(x, 2 + 4 * level, Width::W)?;
        return Ok((field(x, 4 + 4 * level, Width::W)? as u16, sp));
    }
    let esp = field(x, 4 + 8 * level, Width::D)?;
    Ok((field(x, 8 + 8 * level, Width::W)? as u16, esp))
}

/// Does the I/O permission map allow all `bytes` ports from `port` on? What lies beyond the limit is forbidden.
///
/// # Errors
/// #PF.
pub fn ports_allowed(x: &mut Exec<'_>, port: u16, bytes: u64) -> Result<bool, Stop> {
    const MAP_BASE: u64 = 0x66;
    let limit = u64::from(x.cpu.tr.limit);
    let wide = matches!(x.cpu.tr.attr.kind(), kind::TSS_AVAILABLE | kind::TSS_BUSY);
    // A process has no I/O permission map; a 16-bit TSS neither.
    if x.mem.flat().is_some() || !(wide || is_ia32e(x.cpu)) || limit < MAP_BASE + 1 {
        return Ok(false);
    }
    let map = field(x, MAP_BASE, Width::W)?;
    // "the processor reads two bytes from the I/O permission bit map", also where one would do.
    let at = map + u64::from(port) / 8;
    if at + 1 > limit {
        return Ok(false);
    }
    let bits = field(x, at, Width::W)? >> (port & 7);
    Ok(bits & ((1 << bytes) - 1) == 0)
}

/// Does the software interrupt redirection bit map send INT `vector` to the 8086 program's own handler? (SDM 3B 20.3.3; CR4.VME)
///
/// # Errors
/// #GP(0) if the map lies beyond the limit; #PF.
pub fn redirected(x: &mut Exec<'_>, vector: u8) -> Result<bool, Stop> {
    let map = field(x, 0x66, Width::W)?;
    let at = map.wrapping_sub(32).wrapping_add(u64::from(vector) / 8);
    if at > u64::from(x.cpu.tr.limit) {
        return Err(Fault::Gp(0).into());
    }
    Ok(field(x, at, Width::B)? >> (vector & 7) & 1 == 0)
}

#[cfg(test)]
mod tests {
    use crate::cpu::{Fault, Rflags};
    use crate::interp::sensitive::testing::*;
    use crate::isa::{Gpr, Width};
    use crate::vcpu::Exit;

    /// IN AL, DX at CPL 3 with IOPL 0: allowed exactly where the map has a clear bit (SDM 1 19.5.2).
    #[test]
    fn io_permission_map() {
        const MAP: u16 = 0x68;
        let run = |code: &[u8], port: u64, limit: u32| {
            let mut m = machine(3, code);
            m.mem.store(TSS_BASE + 0x66, Width::W, u64::from(MAP)).expect("RAM");
            m.mem.write(TSS_BASE + u64::from(MAP), &[0xff; 16]).expect("RAM");
            // Ports 16 to 19 are open.
            m.mem.store(TSS_BASE + u64::from(MAP) + 2, Width::B, 0xf0).expect("RAM");
            m.cpu().tr.limit = limit;
            m.cpu().gpr[Gpr::Rdx as usize] = port;
            m.run(1)
        };
        let gp = Exit::Exception(Fault::Gp(0));
        let (byte, word, dword): (&[u8], &[u8], &[u8]) = (&[0xec], &[0x66, 0xed], &[0xed]);
        assert_eq!(run(byte, 16, 0x80), Exit::Budget);
        assert_eq!(run(byte, 19, 0x80), Exit::Budget);
        assert_eq!(run(byte, 15, 0x80), gp);
        assert_eq!(run(byte, 20, 0x80), gp);
        assert_eq!(run(word, 18, 0x80), Exit::Budget);
        assert_eq!(run(word, 19, 0x80), gp);
        assert_eq!(run(dword, 16, 0x80), Exit::Budget);
        assert_eq!(run(dword, 17, 0x80), gp);
        // Two bytes are read: the second must be inside the limit too.
        assert_eq!(run(byte, 16, 0x6b), Exit::Budget);
        assert_eq!(run(byte, 16, 0x6a), gp);
        assert_eq!(run(byte, 16, 0x66), gp);
    }

    /// With CPL <= IOPL the map is not asked.
    #[test]
    fn iopl_is_enough() {
        let mut m = machine(3, &[0xec]);
        m.cpu().rflags |= Rflags::IOPL;
        m.cpu().tr.limit = 0;
        assert_eq!(m.run(1), Exit::Budget);
        assert_eq!(m.cpu().gpr[0], 0xff);
    }
}
