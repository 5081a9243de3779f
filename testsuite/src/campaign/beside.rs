//! Cases one by one, in code of any width, each on memory set up anew: what strategies with shrinking need.

use super::arena::{self, BASE, View};
use super::batch::tail;
use super::case::Case;
use super::engine::{Engine, Which};
use super::expected::Expected;
use super::modes::Modes;
use super::modes::oracle::local_table;
use super::oracle::Oracle;
use super::outcome::{Outcome, compare, take_memory};
use bivisor_emulator::mem::Prot;

/// The host CPU, if it can be had, and the engines in software.
pub struct Beside {
    oracle: Option<(Oracle, View)>,
    engines: Vec<Engine>,
    modes: Modes,
    expected: Expected,
}

/// What came out of a case, by name: the first is the judge's.
pub type Outcomes = Vec<(&'static str, Outcome)>;

/// An engine that cases can be run on.
pub trait Runs {
    /// As outcomes call it.
    fn name(&self) -> &'static str;
    /// The arena as it sees it.
    fn view(&self) -> View;
    /// All code in the arena was changed from outside.
    fn all_changed(&mut self);
    /// Runs a case whose memory is set up.
    ///
    /// # Errors
    /// The engine left in a way that no instruction of a case can cause.
    fn run(&mut self, case: &Case, out: &mut Outcome) -> Result<(), String>;
}

impl Runs for Engine {
    fn name(&self) -> &'static str {
        self.which.name()
    }
    fn view(&self) -> View {
        self.view
    }
    fn all_changed(&mut self) {
        let code = arena::PAGES.into_iter().filter(|p| p.2.contains(Prot::EXEC));
        code.for_each(|p| self.code_changed(p.0..p.0 + p.1));
        self.own_changed();
    }
    fn run(&mut self, case: &Case, out: &mut Outcome) -> Result<(), String> {
        Engine::run(self, case, out)
    }
}

/// What comes out of a case, with this `code` at its addresses, on the host CPU, if it is the judge, and on the engines, each on all memory set
/// up anew.
///
/// # Errors
/// As [`Runs::run`].
pub fn on_each<'a, E: Runs + 'a>(
    case: &Case,
    pristine: &[u8],
    code: &[(u64, &[u8])],
    host: Option<(View, impl FnOnce(&Case, &mut Outcome))>,
    engines: impl Iterator<Item = &'a mut E>,
) -> Result<Outcomes, String> {
    let fill = |view: View| {
        view.write(BASE, pristine);
        case.fill(view, pristine);
        code.iter().for_each(|(at, bytes)| view.write(*at, bytes));
    };
    let mut out = Vec::new();
    if let Some((view, run)) = host {
        let mut o = Outcome::default();
        fill(view);
        run(case, &mut o);
        take_memory(case, view, &mut o);
        out.push(("host", o));
    }
    for engine in engines {
        let mut o = Outcome::default();
        fill(engine.view());
        engine.all_changed();
        engine.run(case, &mut o)?;
        take_memory(case, engine.view(), &mut o);
        out.push((engine.name(), o));
    }
    Ok(out)
}

impl Beside {
    /// Makes all of them.
    ///
    /// # Errors
    /// A sentence: there is no memory for an engine.
    pub fn new() -> Result<Beside, String> {
        const SOFTWARE: [Which; 4] = [Which::Interp, Which::Bt, Which::InterpPaged, Which::BtPaged];
        let mut engines = SOFTWARE.into_iter().map(Engine::new).collect::<Result<Vec<_>, _>>()?;
        engines.iter_mut().for_each(Engine::map_own);
        let view = arena::flat_view()?;
        Ok(Beside {
            oracle: Oracle::new(view).map(|o| (o, view)),
            engines,
            modes: Modes::new(&[Which::InterpPaged, Which::BtPaged], true)?,
            expected: Expected::default(),
        })
    }

    /// Is the host CPU the judge of code of so many bits?
    pub fn has_host(&self, bits: u32) -> bool {
        if bits == 64 { self.oracle.is_some() } else { self.modes.has_host() }
    }

    /// An engine of 64-bit code.
    pub fn engine(&mut self, which: Which) -> Option<&mut Engine> {
        self.engines.iter_mut().find(|e| e.which == which)
    }

    /// What comes out of a case on the host CPU and on all engines.
    ///
    /// # Errors
    /// An engine left in a way that no instruction of a case can cause.
    pub fn outcomes(&mut self, case: &Case, pristine: &[u8]) -> Result<Outcomes, String> {
        arena::renew_own(true);
        if case.kind.bits() != 64 {
            return self.modes.outcomes(case, pristine);
        }
        let end = case.rip + case.code.len() as u64;
        let code = [(case.rip, &case.code[..]), (end, &tail(end)[..])];
        let host = match &mut self.oracle {
            Some((oracle, view)) => {
                local_table(false)?;
                Some((*view, |case: &Case, o: &mut Outcome| oracle.run(case, o)))
            }
            None => None,
        };
        on_each(case, pristine, &code, host, self.engines.iter_mut())
    }

    /// How the engines differ from the judge, but for what is expected.
    pub fn difference(&self, case: &Case, outcomes: &Outcomes) -> Option<String> {
        let ((judge, should), rest) = outcomes.split_first()?;
        rest.iter().find_map(|(name, is)| {
            let (part, what) = compare(case, is, should)?;
            let listed = self.expected.find(name, case, part, is, should).is_some();
            (!listed).then(|| format!("{name} beside {judge}: {what}"))
        })
    }
}
