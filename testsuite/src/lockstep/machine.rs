//! Lockstep of two machines with counted time: the same instructions on both, then every register and every page that either has
//! written is compared. Where they differ first is sought by starting anew with ever smaller parts.

use super::state;
pub use super::state::Change;
use bivisor_emulator::cpu::{CpuState, Rflags};
use bivisor_emulator::machine::{End, Machine};
use bivisor_emulator::mem::PAGE_SIZE;
use bivisor_emulator::vcpu::Exit;

/// How much is done, and how fine.
#[derive(Clone, Copy, Debug)]
pub struct Plan {
    /// Instructions in all.
    pub instructions: u64,
    /// Instructions between two comparisons, at most.
    pub every: u64,
}

/// Where two machines part.
#[derive(Clone, Debug)]
pub struct Parting {
    /// Instructions after which they were the same.
    pub after: u64,
    /// So many instructions later they are not; 1: it is one instruction.
    pub within: u64,
    /// The processor before.
    pub before: CpuState,
    /// The bytes at RIP then, as far as the page goes; empty if they are not in RAM.
    pub code: Vec<u8>,
    /// What differs: interpreter's and translator's.
    pub changes: Vec<Change>,
}

/// What came of it.
#[derive(Clone, Debug, Default)]
pub struct Outcome {
    /// Instructions compared.
    pub instructions: u64,
    /// Comparisons.
    pub comparisons: u64,
    /// Why both machines stopped before all was done.
    pub ended: Option<End>,
    /// Where they part.
    pub parting: Option<Parting>,
}

/// Makes the two machines, the reference first, in the same state.
pub type Make<'a> = dyn FnMut() -> Result<(Machine, Machine), String> + 'a;

/// Runs two machines side by side; `told` is asked after each comparison with the instructions done.
///
/// # Errors
/// The machines cannot be made.
pub fn run(make: &mut Make<'_>, plan: Plan, told: &mut dyn FnMut(u64)) -> Result<Outcome, String> {
    let mut outcome = once(make, plan, 0, told)?;
    let mut every = plan.every;
    // The parts before are the same as they were, so that time passes as it did.
    while let Some(parting) = outcome.parting.as_ref().filter(|p| p.within > 1) {
        every = (every.min(parting.within) / 16).max(1);
        let finer =
            once(make, Plan { instructions: parting.after + 2 * plan.every, every }, parting.after, &mut |_| {})?;
        match finer.parting {
            Some(p) if p.within < parting.within => outcome.parting = Some(p),
            // In smaller parts it does not show.
            _ => break,
        }
    }
    Ok(outcome)
}

/// One pass: parts of a round are only made smaller after `from` instructions.
fn once(make: &mut Make<'_>, plan: Plan, from: u64, told: &mut dyn FnMut(u64)) -> Result<Outcome, String> {
    let (mut a, mut b) = make()?;
    for m in [&a, &b] {
        if let Some(ram) = m.memory().ram() {
            ram.track_dirty();
        }
    }
    let mut out = Outcome::default();
    while out.instructions < plan.instructions {
        let (round, other) = (a.begin_round(), b.begin_round());
        let mut last = (Exit::Budget, Exit::Budget);
        let mut done = 0;
        if round != other {
            let before = a.state().clone();
            let change = Change { what: "time".into(), reference: format!("{round:?}"), tested: format!("{other:?}") };
            out.parting = Some(parting(&a, out.instructions, 0, before, vec![change]));
            return Ok(out);
        }
        while done < round.budget && last == (Exit::Budget, Exit::Budget) {
            let before = a.state().clone();
            let at = out.instructions + done;
            let part = if at < from { from - at } else { plan.every }.min(round.budget - done);
            let ((exit_a, done_a), (exit_b, done_b)) = (a.run_part(part), b.run_part(part));
            out.comparisons += 1;
            let mut changes = Vec::new();
            if (exit_a, done_a) != (exit_b, done_b) {
                let (reference, tested) =
                    (format!("{exit_a:x?} after {done_a}"), format!("{exit_b:x?} after {done_b}"));
                changes.push(Change { what: "end".into(), reference, tested });
            }
            changes.extend(compare(&mut a, &mut b));
            if !changes.is_empty() {
                out.parting = Some(parting(&a, out.instructions + done, part, before, changes));
                return Ok(out);
            }
            last = (exit_a, exit_b);
            done += done_a;
        }
        out.instructions += done;
        told(out.instructions);
        let ends = (a.end_round(&round, last.0, done, None), b.end_round(&round, last.1, done, None));
        if ends.0 != ends.1 {
            let change =
                Change { what: "end".into(), reference: format!("{:?}", ends.0), tested: format!("{:?}", ends.1) };
            let before = a.state().clone();
            out.parting = Some(parting(&a, out.instructions, 0, before, vec![change]));
            return Ok(out);
        }
        if ends.0.is_some() {
            out.ended = ends.0;
            break;
        }
    }
    Ok(out)
}

fn parting(a: &Machine, after: u64, within: u64, before: CpuState, changes: Vec<Change>) -> Parting {
    let mut code = vec![0; 15];
    // By the page tables as they are now; a guess where they have just changed.
    let laddr = if before.mode().bitness() == 64 { before.rip } else { before.seg[1].base.wrapping_add(before.rip) };
    let mut mmu = bivisor_emulator::mem::Mmu::new();
    let by = if before.cpl() == 3 { bivisor_emulator::mem::By::User } else { bivisor_emulator::mem::By::Supervisor };
    let access = bivisor_emulator::mem::Access::Execute;
    let gpa = mmu.translate(&before, a.memory(), laddr, access, by).ok();
    let fits = (PAGE_SIZE - laddr % PAGE_SIZE).min(15) as usize;
    code.truncate(fits);
    if gpa.and_then(|gpa| a.memory().read(gpa, &mut code)).is_none() {
        code.clear();
    }
    Parting { after, within, before, code, changes }
}

/// Registers, and the pages that either has written since the last time.
fn compare(a: &mut Machine, b: &mut Machine) -> Vec<Change> {
    let mut changes = Vec::new();
    {
        let (x, y) = (a.state(), b.state());
        if !state::same(x, y, Rflags::empty()) || !state::same_system(x, y) {
            changes = state::changes(x, y, Rflags::empty(), true);
        }
    }
    let (Some(x), Some(y)) = (a.memory().ram(), b.memory().ram()) else { return changes };
    let mut pages = x.take_dirty();
    pages.extend(y.take_dirty());
    pages.sort_unstable();
    pages.dedup();
    let (mut left, mut right) = ([0; PAGE_SIZE as usize], [0; PAGE_SIZE as usize]);
    for page in pages {
        let at = page * PAGE_SIZE;
        if x.read(at, &mut left).is_none() || y.read(at, &mut right).is_none() || left == right {
            continue;
        }
        let n = left.iter().zip(&right).position(|(l, r)| l != r).unwrap_or(0);
        let show = |b: &[u8]| b[n..(n + 16).min(b.len())].iter().map(|b| format!("{b:02x}")).collect::<String>();
        let what = format!("memory {:#x}", at + n as u64);
        changes.push(Change { what, reference: show(&left), tested: show(&right) });
    }
    changes
}
