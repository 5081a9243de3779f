//! Measuring whole programs against native, in alternating runs: ratios of CPU time, their median and spread.

pub mod plot;

use serde::Serialize;

/// Ratios of one program under one engine to native, pair by pair.
#[derive(Clone, Debug, Serialize)]
pub struct Ratios {
    /// The program.
    pub program: String,
    /// The engine.
    pub backend: String,
    /// Median of native user+system seconds.
    pub native_seconds: f64,
    /// Median ratio of user+system time.
    pub median: f64,
    /// Smallest ratio.
    pub min: f64,
    /// Largest ratio.
    pub max: f64,
    /// Pairs.
    pub runs: usize,
}

/// The median of some numbers; NaN of none.
pub fn median(numbers: &[f64]) -> f64 {
    let mut sorted = numbers.to_vec();
    sorted.sort_by(f64::total_cmp);
    match sorted.len() {
        0 => f64::NAN,
        n if n % 2 == 1 => sorted[n / 2],
        n => (sorted[n / 2 - 1] + sorted[n / 2]) / 2.0,
    }
}

impl Ratios {
    /// From pairs of (native, engine) seconds.
    pub fn new(program: &str, backend: &str, pairs: &[(f64, f64)]) -> Ratios {
        let ratios: Vec<f64> = pairs.iter().map(|(n, e)| e / n).collect();
        Ratios {
            program: program.to_owned(),
            backend: backend.to_owned(),
            native_seconds: median(&pairs.iter().map(|p| p.0).collect::<Vec<_>>()),
            median: median(&ratios),
            min: ratios.iter().copied().fold(f64::INFINITY, f64::min),
            max: ratios.iter().copied().fold(0.0, f64::max),
            runs: pairs.len(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn medians() {
        assert_eq!(median(&[3.0, 1.0, 2.0]), 2.0);
        assert_eq!(median(&[4.0, 1.0]), 2.5);
        assert!(median(&[]).is_nan());
        let r = Ratios::new("p", "b", &[(1.0, 2.0), (2.0, 2.0), (1.0, 3.0)]);
        assert_eq!((r.median, r.min, r.max, r.runs), (2.0, 1.0, 3.0, 3));
    }
}
