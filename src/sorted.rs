//! Order in short lists. What std sorts with takes some four kilobytes of the program for each type that is sorted or put into
//! a set at once, and few lists here have more than a dozen entries; the long ones, of processes and files, are left to std.

use std::collections::{BTreeMap, BTreeSet};

/// By insertion; equal ones stay in the order they had.
pub fn sort<T: Ord>(list: &mut Vec<T>) {
    sort_by(list, |one, other| one <= other);
}

/// As [`sort`], by a key.
pub fn sort_by_key<T, K: Ord>(list: &mut Vec<T>, key: impl Fn(&T) -> K) {
    sort_by(list, |one, other| key(one) <= key(other));
}

fn sort_by<T>(list: &mut Vec<T>, stays_before: impl Fn(&T, &T) -> bool) {
    for at in 1..list.len() {
        let item = list.remove(at);
        // From the end: what is in order already costs one look each.
        let place = list.iter().take(at).rposition(|other| stays_before(other, &item));
        list.insert(place.map_or(0, |before| before + 1), item);
    }
}

pub fn set<T: Ord>(items: impl IntoIterator<Item = T>) -> BTreeSet<T> {
    let mut set = BTreeSet::new();
    for item in items {
        set.insert(item);
    }
    set
}

/// Of two with the same key the last counts.
pub fn map<K: Ord, V>(items: impl IntoIterator<Item = (K, V)>) -> BTreeMap<K, V> {
    let mut map = BTreeMap::new();
    for (key, value) in items {
        map.insert(key, value);
    }
    map
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn as_std_sorts() {
        for text in ["", "a", "ba", "hello, world", "zyxwvutsrqponmlkjihgfedcba", "aaaabbbbaaaa"] {
            let places: Vec<(char, usize)> = text.chars().zip(0..).collect();
            let (mut expected, mut found) = (places.clone(), places.clone());
            expected.sort_by_key(|(letter, _)| *letter);
            sort_by_key(&mut found, |(letter, _)| *letter);
            assert_eq!(found, expected, "{text}");
            let mut letters: Vec<char> = text.chars().rev().collect();
            sort(&mut letters);
            assert!(letters.is_sorted(), "{text}");
            assert_eq!(set(text.chars()), text.chars().collect(), "{text}");
            assert_eq!(map(places.clone()), places.into_iter().collect(), "{text}");
        }
    }
}
