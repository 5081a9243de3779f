//! What differs from run to run: RDTSC RDTSCP RDPMC RDRAND RDSEED (SDM 2B; SDM 3B 17.17).

use crate::cpu::{Fault, Rflags};
use crate::host::clock;
use crate::interp::{Exec, Step, operand};
use crate::isa::{Gpr, Insn, Width};

/// Where time and randomness come from: the host, or numbers that are the same in every run.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub enum TimeSource {
    /// The host's time-stamp counter and its kernel's random numbers.
    #[default]
    Host,
    /// Repeatable.
    Deterministic {
        /// What the next RDTSC counts from.
        tsc: u64,
        /// What each RDTSC adds.
        step: u64,
        /// State of the random-number generator.
        seed: u64,
    },
}

impl TimeSource {
    /// Repeatable, from a seed: the counter starts at 0 and moves 1000 at each look.
    pub fn deterministic(seed: u64) -> TimeSource {
        TimeSource::Deterministic { tsc: 0, step: 1000, seed }
    }

    /// The time-stamp counter before the guest's offset.
    pub fn tsc(&mut self) -> u64 {
        match self {
            TimeSource::Host => clock::tsc(),
            TimeSource::Deterministic { tsc, step, .. } => {
                *tsc = tsc.wrapping_add(*step);
                *tsc
            }
        }
    }

    /// A random number; `None` if there is none now.
    pub fn random(&mut self) -> Option<u64> {
        match self {
            TimeSource::Host => clock::random(),
            TimeSource::Deterministic { seed, .. } => Some(splitmix64(seed)),
        }
    }
}

/// Steele, Lea and Flood 2014.
fn splitmix64(state: &mut u64) -> u64 {
    *state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let z = (*state ^ *state >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let z = (z ^ z >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ z >> 31
}

/// The time-stamp counter as the guest sees it.
pub fn read_tsc(x: &mut Exec<'_>) -> u64 {
    let counter = x.bus.time_stamp().unwrap_or_else(|| x.env.time.tsc());
    counter.wrapping_add(x.cpu.msr.tsc_offset)
}

/// The pair EDX:EAX; both upper halves are cleared.
pub(super) fn set_edx_eax(x: &mut Exec<'_>, v: u64) {
    x.cpu.write(Gpr::Rax, Width::D, v);
    x.cpu.write(Gpr::Rdx, Width::D, v >> 32);
}

/// RDTSC.
pub fn rdtsc(x: &mut Exec<'_>, _: &Insn) -> Step {
    let v = read_tsc(x);
    set_edx_eax(x, v);
    Ok(())
}

/// RDTSCP: also IA32_TSC_AUX into ECX.
pub fn rdtscp(x: &mut Exec<'_>, i: &Insn) -> Step {
    rdtsc(x, i)?;
    x.cpu.write(Gpr::Rcx, Width::D, x.cpu.msr.tsc_aux);
    Ok(())
}

/// RDPMC: no counters are offered on Intel (CPUID leaf 0xA is empty). AMD's first four are always there; ours do not count.
pub fn rdpmc(x: &mut Exec<'_>, _: &Insn) -> Step {
    const AMD_COUNTERS: u64 = 4;
    let n = x.cpu.read(Gpr::Rcx, Width::D);
    // "If an invalid performance counter index is specified": #GP(0).
    if x.env.cpu_model.is_intel() || n >= AMD_COUNTERS {
        return Err(Fault::Gp(0).into());
    }
    // The counters' MSRs follow the event selectors'; they have 48 bits.
    let v = x.cpu.msr.k7_counters.get((AMD_COUNTERS + n) as usize).copied().unwrap_or(0);
    set_edx_eax(x, v & 0xffff_ffff_ffff);
    Ok(())
}

/// RDRAND, RDSEED: CF says whether there was a number; without one the destination is zero. OF SF ZF AF PF are cleared.
pub fn rdrand(x: &mut Exec<'_>, i: &Insn) -> Step {
    let v = x.env.time.random();
    operand::write(x, i, 0, v.unwrap_or(0))?;
    x.cpu.rflags.remove(Rflags::STATUS);
    x.cpu.rflags.set(Rflags::CF, v.is_some());
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn deterministic_source_repeats() {
        let mut a = TimeSource::deterministic(42);
        let mut b = TimeSource::deterministic(42);
        let first = [a.tsc(), a.random().unwrap_or(0), a.tsc(), a.random().unwrap_or(0)];
        assert_eq!(first, [b.tsc(), b.random().unwrap_or(0), b.tsc(), b.random().unwrap_or(0)]);
        assert_eq!((first[0], first[2]), (1000, 2000));
        assert_ne!(first[1], first[3]);
    }

    /// The reference output of SplitMix64 for seed 1234567.
    #[test]
    fn splitmix_reference_values() {
        let mut s = 1_234_567;
        assert_eq!([splitmix64(&mut s), splitmix64(&mut s)], [6_457_827_717_110_365_317, 3_203_168_211_198_807_973]);
    }
}
