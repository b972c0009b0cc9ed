//! Fractions in few digits. What Rust writes a float with is a hundredth of the program, and no number here needs it.

use std::time::Duration;

/// `10`, `0.5`: to a thousandth.
pub fn seconds(time: Duration) -> String {
    let text = format!("{}.{:03}", time.as_secs(), time.subsec_millis());
    text.trim_end_matches('0').trim_end_matches('.').to_string()
}

/// Up to the next whole one.
pub fn whole_seconds(time: Duration) -> u64 {
    time.as_secs() + u64::from(time.subsec_nanos() > 0)
}

/// `2.3`: how often a unit goes into something, to a tenth.
pub fn tenths(amount: u64, unit: u64) -> String {
    let tenths = (amount * 10 + unit / 2) / unit;
    format!("{}.{}", tenths / 10, tenths % 10)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn as_many_digits_as_there_are() {
        let told = |ms: u64| seconds(Duration::from_millis(ms));
        assert_eq!([0, 100, 500, 1500, 2034, 10_000].map(told), ["0", "0.1", "0.5", "1.5", "2.034", "10"]);
    }

    #[test]
    fn a_begun_second_is_one() {
        assert_eq!([0, 1, 999, 1000, 1001].map(|ms| whole_seconds(Duration::from_millis(ms))), [0, 1, 1, 1, 2]);
    }

    #[test]
    fn tenths_are_rounded() {
        assert_eq!(
            [0, 49, 50, 149, 150, 1000].map(|amount| tenths(amount, 1000)),
            ["0.0", "0.0", "0.1", "0.1", "0.2", "1.0"]
        );
    }
}
