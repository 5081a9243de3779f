//! Where the time of an operation goes: by class of exit, count × what one of that class costs.
//!
//! What one costs is fitted for each engine over all its operations: the costs, none negative, that explain the measured times with the
//! smallest sum of squares of relative errors. What they do not explain is the guest's own instructions, and error: the rest.

use super::{Entry, Row};
use serde::Serialize;
use std::collections::BTreeMap;

/// A part of an operation's time.
#[derive(Clone, Debug, Serialize)]
pub struct Part {
    /// Which class.
    pub class: &'static str,
    /// How often.
    pub times: f64,
    /// Nanoseconds of all of them.
    pub ns: f64,
}

/// One operation on one engine.
#[derive(Clone, Debug, Serialize)]
pub struct Breakdown {
    /// Which.
    pub operation: &'static str,
    /// On which.
    pub engine: &'static str,
    /// Nanoseconds in all.
    pub total: f64,
    /// By class; together not more than the total.
    pub parts: Vec<Part>,
    /// The rest.
    pub rest: f64,
}

/// What one exit of each class costs on an engine, nanoseconds.
pub type Units = BTreeMap<&'static str, BTreeMap<&'static str, f64>>;

/// The class of a reason in the ledger; `None`: it is no time of its own.
fn class(engine: &str, reason: &str) -> Option<&'static str> {
    let is = |what: &str| reason.contains(what);
    match engine {
        "bt" if is("a stretch") => Some("stretch interpreted"),
        "bt" if is("call-out") => Some("call-out"),
        "bt" if is("inline TLB") => Some("TLB miss"),
        "bt" if is("exception") => Some("exception"),
        "bt" => Some("block looked up"),
        "trap" if is("hidden") => Some("hidden page fault"),
        "trap" if is("shadow") => Some("shadow thrown away"),
        "trap" => Some("trap"),
        "kvm" if is("one step of") => Some("call-out"),
        "kvm" if is("to the monitor:") => Some("exit to the monitor"),
        "kvm" if is("(insn_emulation)") => Some("emulated in the kernel"),
        "kvm" if is("(exits)") => Some("exit to the kernel"),
        "interp" if is("delivered") => Some("event delivered"),
        "interp" => Some("sensitive instruction"),
        _ => None,
    }
}

/// How often each class comes in one operation.
fn counts(operation: &str, engine: &str, ledger: &[Entry]) -> BTreeMap<&'static str, f64> {
    let mut out: BTreeMap<&'static str, f64> = BTreeMap::new();
    for e in ledger.iter().filter(|e| e.operation == operation && e.engine == engine) {
        if let Some(c) = class(engine, &e.reason) {
            *out.entry(c).or_default() += e.times;
        }
    }
    // KVM counts an exit that goes on to the monitor twice.
    if let (Some(monitor), Some(kernel)) = (out.get("exit to the monitor").copied(), out.get_mut("exit to the kernel"))
    {
        *kernel = (*kernel - monitor).max(0.0);
    }
    out.retain(|_, n| *n > 0.05);
    out
}

/// One operation: nanoseconds, and how often each class.
type Observed = (f64, BTreeMap<&'static str, f64>);

/// Coordinate descent: each cost in turn is set to what is best for it, the others given.
fn fit(observed: &[Observed]) -> BTreeMap<&'static str, f64> {
    let mut costs: BTreeMap<&'static str, f64> =
        observed.iter().flat_map(|(_, c)| c.keys().map(|k| (*k, 0.0))).collect();
    let classes: Vec<&'static str> = costs.keys().copied().collect();
    for _ in 0..500 {
        for class in &classes {
            let (mut up, mut down) = (0.0, 0.0);
            for (ns, counts) in observed.iter().filter(|(ns, c)| *ns > 0.0 && c.contains_key(class)) {
                let others: f64 = counts.iter().filter(|(k, _)| *k != class).map(|(k, n)| n * costs[k]).sum();
                let n = counts[class] / ns;
                up += n * (1.0 - others / ns);
                down += n * n;
            }
            costs.insert(class, if down > 0.0 { (up / down).max(0.0) } else { 0.0 });
        }
    }
    costs
}

/// Of all operations on all engines.
pub(super) fn all(rows: &[Row], ledger: &[Entry], engines: &[&'static str]) -> (Vec<Breakdown>, Units) {
    let mut out = Vec::new();
    let mut units = Units::new();
    for engine in engines {
        let observed: Vec<(&'static str, Observed)> = rows
            .iter()
            .filter_map(|r| Some((r.name, (r.values.get(engine)?.median, counts(r.name, engine, ledger)))))
            .collect();
        let costs = fit(&observed.iter().map(|(_, o)| o.clone()).collect::<Vec<_>>());
        for (operation, (total, counts)) in observed {
            let sum: f64 = counts.iter().map(|(k, n)| n * costs[k]).sum();
            // Not more than there was.
            let scale = if sum > total { total / sum } else { 1.0 };
            let parts: Vec<Part> = counts
                .into_iter()
                .map(|(class, times)| Part { class, times, ns: times * costs[class] * scale })
                .collect();
            let rest = (total - sum).max(0.0);
            out.push(Breakdown { operation, engine, total, parts, rest });
        }
        if !costs.is_empty() {
            units.insert(engine, costs);
        }
    }
    (out, units)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Costs of 100 and 7, with times that follow from them exactly, come out again; and one that explains nothing is 0.
    #[test]
    fn a_fit_finds_the_costs() {
        let of = |a: f64, b: f64, c: f64| {
            let counts = [("a", a), ("b", b), ("c", c)].into_iter().filter(|(_, n)| *n > 0.0).collect();
            (100.0 * a + 7.0 * b, counts)
        };
        let costs = fit(&[of(1.0, 0.0, 0.0), of(1.0, 3.0, 0.0), of(2.0, 1.0, 1.0), of(0.0, 4.0, 2.0)]);
        let near = |class: &str, v: f64| assert!((costs[class] - v).abs() < 0.01, "{class}: {costs:?}");
        near("a", 100.0);
        near("b", 7.0);
        near("c", 0.0);
    }
}
