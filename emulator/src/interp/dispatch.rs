//! Mnemonic to function: one match, one row a line, grouped by family. No row: #UD.

use crate::cpu::Fault;
use crate::interp::native::{self, gather, masked, state};
use crate::interp::sensitive::{
    control, cpuid, eflags, far, fast, halt, interrupt, io, iret, msr, segment, table, time,
};
use crate::interp::shape::{Any, Kind, Known, instance, one, shift, two, wider};
use crate::interp::{Exec, Op, Step, branch, flags, hint, stack, string};
use crate::interp::{arith, atomic, bcd, bit, condition, logic, mov, muldiv, shift};
use crate::isa::{Class, Insn, Width};
use iced_x86::Mnemonic as M;

/// The function of an instruction.
#[rustfmt::skip] // one row a line
pub fn op(i: &Insn) -> Op {
    match i.iced.mnemonic() {
        // sensitive: segments and descriptors; before the plain forms of MOV, PUSH, POP, CALL, JMP
        M::Mov if i.facts.class == Class::Segment => segment::mov,
        M::Push if i.facts.class == Class::Segment => segment::push,
        M::Pop if i.facts.class == Class::Segment => segment::pop,
        M::Lds | M::Les | M::Lfs | M::Lgs | M::Lss => segment::load_far_pointer,
        M::Arpl => segment::arpl,
        M::Lar => segment::lar,
        M::Lsl => segment::lsl,
        M::Verr => segment::verr,
        M::Verw => segment::verw,
        M::Swapgs => segment::swapgs,
        M::Rdfsbase | M::Rdgsbase => segment::rdbase,
        M::Wrfsbase | M::Wrgsbase => segment::wrbase,
        M::Call if i.facts.class == Class::Segment => far::call,
        M::Jmp if i.facts.class == Class::Segment => far::jmp,
        M::Retf => far::ret,
        M::Iret | M::Iretd | M::Iretq => iret::iret,
        M::Int => interrupt::int,
        M::Int1 => interrupt::int1,
        M::Int3 => interrupt::int3,
        M::Into => interrupt::into,

        // sensitive: control registers, MSRs, identity, fast calls, ports
        M::Mov if i.facts.class == Class::System => control::mov,
        M::Smsw => control::smsw,
        M::Lmsw => control::lmsw,
        M::Clts => control::clts,
        M::Invlpg => control::invlpg,
        M::Invpcid => control::invpcid,
        M::Invd | M::Wbinvd | M::Wbnoinvd => control::wbinvd,
        M::Xgetbv => control::xgetbv,
        M::Xsetbv => control::xsetbv,
        M::Stac => control::stac,
        M::Clac => control::clac,
        M::Rdmsr => msr::rdmsr,
        M::Wrmsr => msr::wrmsr,
        M::Cpuid => cpuid::cpuid,
        M::Rdpid => cpuid::rdpid,
        M::Syscall => fast::syscall,
        M::Sysret | M::Sysretq => fast::sysret,
        M::Sysenter => fast::sysenter,
        M::Sysexit | M::Sysexitq => fast::sysexit,
        M::Hlt => halt::hlt,
        M::Monitor => halt::monitor,
        M::Mwait => halt::mwait,
        M::In => io::r#in,
        M::Out => io::out,
        M::Insb | M::Insw | M::Insd => io::ins,
        M::Outsb | M::Outsw | M::Outsd => io::outs,

        // sensitive: flags, tables, time
        M::Pushf | M::Pushfd | M::Pushfq => eflags::pushf,
        M::Popf | M::Popfd | M::Popfq => eflags::popf,
        M::Cli => eflags::cli,
        M::Sti => eflags::sti,
        M::Sgdt => table::sgdt,
        M::Sidt => table::sidt,
        M::Sldt => table::sldt,
        M::Str => table::str,
        M::Lgdt => table::lgdt,
        M::Lidt => table::lidt,
        M::Lldt => table::lldt,
        M::Ltr => table::ltr,
        M::Rdtsc => time::rdtsc,
        M::Rdtscp => time::rdtscp,
        M::Rdpmc => time::rdpmc,
        M::Rdrand | M::Rdseed => time::rdrand,

        // branch
        M::Jmp => branch::jmp,
        M::Call => branch::call,
        M::Ret => branch::ret,
        M::Jo => branch::jo,
        M::Jno => branch::jno,
        M::Jb => branch::jb,
        M::Jae => branch::jae,
        M::Je => branch::je,
        M::Jne => branch::jne,
        M::Jbe => branch::jbe,
        M::Ja => branch::ja,
        M::Js => branch::js,
        M::Jns => branch::jns,
        M::Jp => branch::jp,
        M::Jnp => branch::jnp,
        M::Jl => branch::jl,
        M::Jge => branch::jge,
        M::Jle => branch::jle,
        M::Jg => branch::jg,
        M::Loop => branch::r#loop,
        M::Loope => branch::loope,
        M::Loopne => branch::loopne,
        M::Jcxz | M::Jecxz | M::Jrcxz => branch::jrcxz,

        // stack
        M::Push => one!(i, stack::push_op),
        M::Pop => one!(i, stack::pop_op),
        M::Pusha | M::Pushad => stack::pusha,
        M::Popa | M::Popad => stack::popa,
        M::Enter => stack::enter,
        M::Leave => stack::leave,

        // string; MOVSD and CMPSD are SSE instructions too
        M::Movsb | M::Movsw | M::Movsq => string::movs,
        M::Movsd if i.facts.class == Class::String => string::movs,
        M::Stosb | M::Stosw | M::Stosd | M::Stosq => string::stos,
        M::Lodsb | M::Lodsw | M::Lodsd | M::Lodsq => string::lods,
        M::Cmpsb | M::Cmpsw | M::Cmpsq => string::cmps,
        M::Cmpsd if i.facts.class == Class::String => string::cmps,
        M::Scasb | M::Scasw | M::Scasd | M::Scasq => string::scas,

        // flags
        M::Clc => flags::clc,
        M::Stc => flags::stc,
        M::Cmc => flags::cmc,
        M::Cld => flags::cld,
        M::Std => flags::std,
        M::Lahf => flags::lahf,
        M::Sahf => flags::sahf,

        // hint
        M::Reservednop => hint::reserved_nop,
        M::Nop | M::Pause | M::Endbr32 | M::Endbr64 | M::Rdsspd | M::Rdsspq => hint::nop,
        M::Prefetch | M::Prefetchw | M::Prefetchwt1 => hint::nop,
        M::Prefetchnta | M::Prefetcht0 | M::Prefetcht1 | M::Prefetcht2 | M::Prefetchit0 | M::Prefetchit1 => hint::nop,
        M::Mfence | M::Lfence | M::Sfence => hint::mfence,
        M::Clflush | M::Clflushopt | M::Clwb => hint::clflush,
        M::Cldemote => hint::nop,

        // conditions
        M::Seto | M::Setno | M::Setb | M::Setae | M::Sete | M::Setne | M::Setbe | M::Seta => condition::setcc,
        M::Sets | M::Setns | M::Setp | M::Setnp | M::Setl | M::Setge | M::Setle | M::Setg => condition::setcc,
        M::Cmovo | M::Cmovno | M::Cmovb | M::Cmovae | M::Cmove | M::Cmovne | M::Cmovbe | M::Cmova => wider!(i, condition::cmovcc),
        M::Cmovs | M::Cmovns | M::Cmovp | M::Cmovnp | M::Cmovl | M::Cmovge | M::Cmovle | M::Cmovg => wider!(i, condition::cmovcc),

        // moves
        M::Mov if i.facts.class == Class::Integer => two!(i, mov::mov),
        M::Movzx => wider!(i, mov::mov),
        M::Movnti => two!(i, mov::mov),
        M::Movsx | M::Movsxd => wider!(i, mov::movsx),
        M::Xchg => mov::xchg,
        M::Bswap => mov::bswap,
        M::Movbe => mov::movbe,
        M::Lea => wider!(i, mov::lea),
        M::Xlatb => mov::xlat,
        M::Cbw | M::Cwde | M::Cdqe => mov::cbw,
        M::Cwd | M::Cdq | M::Cqo => mov::cwd,

        // arithmetic
        M::Add => two!(i, arith::add),
        M::Adc => two!(i, arith::adc),
        M::Sub => two!(i, arith::sub),
        M::Sbb => two!(i, arith::sbb),
        M::Cmp => two!(i, arith::cmp),
        M::Inc => one!(i, arith::inc),
        M::Dec => one!(i, arith::dec),
        M::Neg => one!(i, arith::neg),
        M::Adcx => arith::adcx,
        M::Adox => arith::adox,
        M::Bound => arith::bound,
        M::Mul => muldiv::mul,
        M::Imul => wider!(i, muldiv::imul),
        M::Div => muldiv::div,
        M::Idiv => muldiv::idiv,
        M::Daa => bcd::daa,
        M::Das => bcd::das,
        M::Aaa => bcd::aaa,
        M::Aas => bcd::aas,
        M::Aam => bcd::aam,
        M::Aad => bcd::aad,
        M::Salc => bcd::salc,

        // logic, shifts
        M::And => two!(i, logic::and),
        M::Or => two!(i, logic::or),
        M::Xor => two!(i, logic::xor),
        M::Not => one!(i, logic::not),
        M::Test => two!(i, logic::test),
        M::Shl | M::Sal => shift!(i, shift::shl),
        M::Shr => shift!(i, shift::shr),
        M::Sar => shift!(i, shift::sar),
        M::Rol => shift!(i, shift::rol),
        M::Ror => shift!(i, shift::ror),
        M::Rcl => shift::rcl,
        M::Rcr => shift::rcr,
        M::Shld => shift::shld,
        M::Shrd => shift::shrd,

        // bits
        M::Bt => bit::bt,
        M::Bts => bit::bts,
        M::Btr => bit::btr,
        M::Btc => bit::btc,
        M::Bsf => bit::bsf,
        M::Bsr => bit::bsr,
        M::Tzcnt => bit::tzcnt,
        M::Lzcnt => bit::lzcnt,
        M::Popcnt => bit::popcnt,
        M::Crc32 => bit::crc32,
        M::Andn => bit::andn,
        M::Bextr => bit::bextr,
        M::Blsi => bit::blsi,
        M::Blsmsk => bit::blsmsk,
        M::Blsr => bit::blsr,
        M::Bzhi => bit::bzhi,
        M::Pdep => bit::pdep,
        M::Pext => bit::pext,
        M::Rorx => bit::rorx,
        M::Sarx => bit::sarx,
        M::Shlx => bit::shlx,
        M::Shrx => bit::shrx,
        M::Mulx => bit::mulx,

        // atomic
        M::Xadd => atomic::xadd,
        M::Cmpxchg => atomic::cmpxchg,
        M::Cmpxchg8b => atomic::cmpxchg8b,
        M::Cmpxchg16b => atomic::cmpxchg16b,

        // native: state and irregular memory operands
        M::Wait => native::wait,
        M::Ldmxcsr | M::Vldmxcsr => state::ldmxcsr,
        M::Stmxcsr | M::Vstmxcsr => state::stmxcsr,
        M::Vzeroupper | M::Vzeroall => state::vzeroupper,
        M::Fxsave | M::Fxsave64 => state::fxsave,
        M::Fxrstor | M::Fxrstor64 => state::fxrstor,
        M::Xsave | M::Xsave64 | M::Xsavec | M::Xsavec64 | M::Xsaveopt | M::Xsaveopt64 => state::xsave,
        M::Xrstor | M::Xrstor64 => state::xrstor,
        M::Vmaskmovps | M::Vmaskmovpd | M::Vpmaskmovd | M::Vpmaskmovq => masked::vmaskmov,
        M::Maskmovdqu | M::Vmaskmovdqu => masked::maskmovdqu,
        M::Maskmovq => masked::maskmovq,
        M::Vpgatherdd | M::Vpgatherdq | M::Vpgatherqd | M::Vpgatherqq => gather::gather,
        M::Vgatherdps | M::Vgatherdpd | M::Vgatherqps | M::Vgatherqpd => gather::gather,
        M::Vpscatterdd | M::Vpscatterdq | M::Vpscatterqd | M::Vpscatterqq => gather::scatter,
        M::Vscatterdps | M::Vscatterdpd | M::Vscatterqps | M::Vscatterqpd => gather::scatter,
        _ if i.facts.class == Class::Native => native::run,

        _ => undefined,
    }
}

/// No row: the offered CPU does not have the instruction.
pub fn undefined(_: &mut Exec<'_>, _: &Insn) -> Step {
    Err(Fault::Ud.into())
}
