//! One file with all of its mutants in it, each behind a question whether it is switched on.
//!
//! What is woven in goes around what stands there and never repeats it, so that what is nested stays nested: `a < b` becomes
//! `(match (&(a), &(b)) { (l, r) => if ON(7) { l > r } else { l < r } })`.

use crate::list::{Mutant, Position};
use std::collections::BTreeMap;
use std::ops::Range;
use syn::spanned::Spanned;
use syn::visit::{self, Visit};
use syn::{BinOp, Expr};

/// Text that takes the place of what stands at `at`, which is often nothing.
struct Edit {
    at: Range<usize>,
    /// At one place: what ends there, inner before outer, before what begins there, outer before inner.
    rank: (u8, i64),
    /// Each with the mutant that it is of, if only of one.
    pieces: Vec<(Option<usize>, String)>,
    site: usize,
}

/// A file, and where something can be woven into it.
pub struct File {
    text: String,
    edits: Vec<Edit>,
    sites: usize,
    /// Of which it is plain that they are no Rust.
    pub unviable: Vec<usize>,
    /// Those that are woven in, by their place.
    pub woven: BTreeMap<usize, usize>,
}

/// What came of a file, and where the mutants are in it.
pub struct Woven {
    pub text: String,
    /// In the order in which they stand there: where, its place, and the mutant that it is of.
    pieces: Vec<(Range<usize>, usize, Option<usize>)>,
}

/// Whom an error of the compiler is about.
#[derive(Debug, PartialEq)]
pub enum Blame {
    /// What it does is no Rust.
    Mutant(usize),
    /// It cannot be woven in like this.
    Site(usize),
}

impl Woven {
    pub fn blame(&self, error: &Range<usize>) -> Option<Blame> {
        let holds = |range: &Range<usize>| range.start <= error.start && error.end <= range.end;
        let own = self.pieces.iter().filter(|(range, ..)| holds(range)).filter_map(|(_, _, mutant)| *mutant).next();
        if let Some(mutant) = own {
            return Some(Blame::Mutant(mutant));
        }
        let mut sites: BTreeMap<usize, Range<usize>> = BTreeMap::new();
        for (range, site, _) in &self.pieces {
            let whole = sites.entry(*site).or_insert_with(|| range.clone());
            whole.end = range.end;
        }
        let around = sites.into_iter().filter(|(_, range)| holds(range));
        around.min_by_key(|(_, range)| range.len()).map(|(site, _)| Blame::Site(site))
    }
}

impl File {
    /// # Errors
    /// When it is no Rust.
    pub fn new(text: &str, mutants: &[&Mutant]) -> syn::Result<File> {
        let mut lines = vec![0];
        lines.extend(text.match_indices('\n').map(|(at, _)| at + 1));
        let (unviable, woven) = (Vec::new(), BTreeMap::new());
        let file = File { text: text.to_string(), edits: Vec::new(), sites: 0, unviable, woven };
        let mut weaver = Weaver { file, lines, by_start: BTreeMap::new() };
        for mutant in mutants {
            weaver.by_start.entry(mutant.start).or_default().push((*mutant).clone());
        }
        weaver.visit_file(&syn::parse_file(text)?);
        weaver.file.edits.sort_by_key(|edit| (edit.at.start, edit.rank));
        Ok(weaver.file)
    }

    pub fn drop_mutant(&mut self, mutant: usize) {
        self.woven.remove(&mutant);
    }

    /// Those that were woven in there.
    pub fn drop_site(&mut self, site: usize) -> Vec<usize> {
        let gone: Vec<usize> = self.woven.iter().filter(|(_, at)| **at == site).map(|(mutant, _)| *mutant).collect();
        self.woven.retain(|_, at| *at != site);
        gone
    }

    pub fn weave(&self) -> Woven {
        let mut woven = Woven { text: String::new(), pieces: Vec::new() };
        let mut from = 0;
        for edit in &self.edits {
            if !self.woven.values().any(|site| *site == edit.site) {
                continue;
            }
            woven.text.push_str(&self.text[from..edit.at.start]);
            from = edit.at.end;
            for (mutant, text) in &edit.pieces {
                if mutant.is_some_and(|mutant| !self.woven.contains_key(&mutant)) {
                    continue;
                }
                let begin = woven.text.len();
                woven.text.push_str(text);
                woven.pieces.push((begin..woven.text.len(), edit.site, *mutant));
            }
        }
        woven.text.push_str(&self.text[from..]);
        woven
    }
}

struct Weaver {
    file: File,
    lines: Vec<usize>,
    by_start: BTreeMap<Position, Vec<Mutant>>,
}

/// Where an expression is, in bytes.
fn on(mutant: &Mutant) -> String {
    format!("crate::mutation::on({})", mutant.number)
}

impl Weaver {
    fn byte(&self, (line, column): Position) -> usize {
        let begin = self.lines[line - 1];
        let after = self.file.text[begin..].char_indices().nth(column - 1);
        after.map_or(self.file.text.len(), |(at, _)| begin + at)
    }

    fn range(&self, spanned: &impl Spanned) -> Range<usize> {
        let span = spanned.span();
        let (start, end) = (span.start(), span.end());
        self.byte((start.line, start.column + 1))..self.byte((end.line, end.column + 1))
    }

    /// The mutants whose span begins where this does, or a list without any.
    fn mutants(&self, spanned: &impl Spanned, genre: &str) -> Vec<Mutant> {
        let start = spanned.span().start();
        let here = self.by_start.get(&(start.line, start.column + 1)).into_iter().flatten();
        here.filter(|mutant| mutant.genre == genre).cloned().collect()
    }

    fn site(&mut self, mutants: &[Mutant]) -> usize {
        self.file.sites += 1;
        for mutant in mutants {
            self.file.woven.insert(mutant.number, self.file.sites);
        }
        self.file.sites
    }

    fn edit(&mut self, site: usize, at: Range<usize>, rank: (u8, i64), pieces: Vec<(Option<usize>, String)>) {
        self.file.edits.push(Edit { at, rank, pieces, site });
    }

    /// Something before what stands there, and something after it.
    fn around(
        &mut self,
        site: usize,
        range: &Range<usize>,
        outside: usize,
        before: &str,
        after: Vec<(Option<usize>, String)>,
    ) {
        let (start, end) = ((range.start - outside) as i64, (range.end + outside) as i64);
        self.edit(site, range.start..range.start, (1, -end), vec![(None, before.to_string())]);
        self.edit(site, range.end..range.end, (0, -start), after);
    }

    fn instead(&mut self, site: usize, range: Range<usize>, text: &str) {
        self.edit(site, range, (2, 0), vec![(None, text.to_string())]);
    }

    fn body(&mut self, block: &syn::Block) {
        let span = block.brace_token.span.open().end();
        let at = self.byte((span.line, span.column + 1));
        // Its span is what stands between the braces.
        let first = block.stmts.first().map(|statement| statement.span().start());
        let Some(first) = first else { return };
        let here = self.by_start.get(&(first.line, first.column + 1)).into_iter().flatten();
        // Of a type that has no name the function's own value says what it is: there cannot be two.
        let here = here.filter(|mutant| mutant.genre == "FnValue" && !mutant.returns.contains("impl "));
        let mutants: Vec<Mutant> = here.cloned().collect();
        if mutants.is_empty() {
            return;
        }
        let site = self.site(&mutants);
        let text = |mutant: &Mutant| match mutant.replacement.as_str() {
            "()" => format!(" if {} {{ return; }}", on(mutant)),
            value => format!(" if {} {{ return {value}; }}", on(mutant)),
        };
        let pieces = mutants.iter().map(|mutant| (Some(mutant.number), text(mutant))).collect();
        self.edit(site, at..at, (1, i64::MIN), pieces);
    }

    /// Between two values that may be looked at first.
    fn between(&mut self, binary: &syn::ExprBinary, mutants: &[Mutant], by: &str) {
        let site = self.site(mutants);
        let operator = self.range(&binary.op);
        let was = self.file.text[operator.clone()].to_string();
        let mut after = vec![(None, ")) { (l, r) => ".to_string())];
        for mutant in mutants {
            after.push((Some(mutant.number), format!("if {} {{ l {} r }} else ", on(mutant), mutant.replacement)));
        }
        after.push((None, format!("{{ l {was} r }} }})")));
        let whole = self.range(binary);
        self.around(site, &whole, 0, &format!("(match ({by}("), after);
        self.instead(site, operator, &format!("), {by}("));
    }

    /// Between two conditions, of which the second is asked for only when the first leaves it open.
    fn conditions(&mut self, binary: &syn::ExprBinary, mutants: &[Mutant], is_and: bool) {
        for mutant in mutants.iter().take(1) {
            let site = self.site(std::slice::from_ref(mutant));
            let (whole, operator, on) = (self.range(binary), self.range(&binary.op), on(mutant));
            let (middle, end) = match is_and {
                true => (format!(") ^ {on} {{ "), format!(" }} else {{ {on} }})")),
                false => (format!(") ^ {on} {{ !{on} }} else {{ "), " })".to_string()),
            };
            self.around(site, &whole, 0, "(if (", vec![(None, end)]);
            self.instead(site, operator, &middle);
        }
    }

    fn assignment(&mut self, binary: &syn::ExprBinary, mutants: &[Mutant]) {
        let (whole, left, operator) = (self.range(binary), self.range(&*binary.left), self.range(&binary.op));
        let (place, was) = (self.file.text[left.clone()].to_string(), self.file.text[operator.clone()].to_string());
        let site = self.site(mutants);
        let mut after = vec![(None, ") { r => ".to_string())];
        for mutant in mutants {
            after
                .push((Some(mutant.number), format!("if {} {{ {place} {} r }} else ", on(mutant), mutant.replacement)));
        }
        after.push((None, format!("{{ {place} {was} r }} }})")));
        self.edit(site, whole.end..whole.end, (0, -(whole.start as i64)), after);
        self.instead(site, left.start..operator.end, "(match (");
    }

    fn binary(&mut self, binary: &syn::ExprBinary) {
        let mutants = self.mutants(&binary.op, "BinaryOperator");
        if mutants.is_empty() {
            return;
        }
        use BinOp::*;
        match binary.op {
            // Nothing but && may stand beside a binding.
            And(_) | Or(_) if has_binding(&binary.left) || has_binding(&binary.right) => {
                self.file.unviable.extend(mutants.iter().map(|mutant| mutant.number));
            }
            And(_) => self.conditions(binary, &mutants, true),
            Or(_) => self.conditions(binary, &mutants, false),
            Eq(_) | Ne(_) | Lt(_) | Le(_) | Gt(_) | Ge(_) => self.between(binary, &mutants, "&"),
            Add(_) | Sub(_) | Mul(_) | Div(_) | Rem(_) | BitXor(_) | BitAnd(_) | BitOr(_) | Shl(_) | Shr(_) => {
                self.between(binary, &mutants, "");
            }
            _ => self.assignment(binary, &mutants),
        }
    }

    fn arm(&mut self, arm: &syn::Arm) {
        let deleted = self.mutants(arm, "MatchArm");
        let guards = match &arm.guard {
            Some((_, guard)) => self.mutants(&**guard, "MatchArmGuard"),
            None => Vec::new(),
        };
        if let Some(mutant) = deleted.first() {
            let site = self.site(&deleted[..1]);
            match &arm.guard {
                Some((_, guard)) => {
                    let range = self.range(&**guard);
                    self.around(site, &range, 2, &format!("!{} && (", on(mutant)), vec![(None, ")".to_string())]);
                }
                None => {
                    let end = self.range(&arm.pat).end;
                    self.edit(site, end..end, (0, i64::MAX), vec![(None, format!(" if !{} ", on(mutant)))]);
                }
            }
        }
        let Some((_, guard)) = arm.guard.as_ref().filter(|_| !guards.is_empty()) else { return };
        let site = self.site(&guards);
        let by = |value: &str| guards.iter().find(|mutant| mutant.replacement == value).map(on);
        let yes = by("true").unwrap_or_else(|| "false".to_string());
        let no = by("false").unwrap_or_else(|| "false".to_string());
        let range = self.range(&**guard);
        self.around(site, &range, 1, &format!("({yes} || (!{no} && ("), vec![(None, ")))".to_string())]);
    }
}

/// Whether a condition has a `let` in it, and not one in brackets of its own.
fn has_binding(condition: &Expr) -> bool {
    match condition {
        Expr::Let(_) => true,
        Expr::Binary(binary) => has_binding(&binary.left) || has_binding(&binary.right),
        _ => false,
    }
}

impl<'ast> Visit<'ast> for Weaver {
    fn visit_item_fn(&mut self, function: &'ast syn::ItemFn) {
        // What is evaluated by the compiler cannot ask.
        if function.sig.constness.is_none() {
            self.body(&function.block);
            visit::visit_item_fn(self, function);
        }
    }

    fn visit_impl_item_fn(&mut self, function: &'ast syn::ImplItemFn) {
        if function.sig.constness.is_none() {
            self.body(&function.block);
            visit::visit_impl_item_fn(self, function);
        }
    }

    fn visit_trait_item_fn(&mut self, function: &'ast syn::TraitItemFn) {
        if let Some(block) = &function.default {
            self.body(block);
        }
        visit::visit_trait_item_fn(self, function);
    }

    fn visit_item_const(&mut self, _: &'ast syn::ItemConst) {}
    fn visit_impl_item_const(&mut self, _: &'ast syn::ImplItemConst) {}
    fn visit_item_static(&mut self, _: &'ast syn::ItemStatic) {}
    fn visit_type(&mut self, _: &'ast syn::Type) {}
    fn visit_pat(&mut self, _: &'ast syn::Pat) {}

    fn visit_expr_binary(&mut self, binary: &'ast syn::ExprBinary) {
        self.binary(binary);
        visit::visit_expr_binary(self, binary);
    }

    fn visit_expr_unary(&mut self, unary: &'ast syn::ExprUnary) {
        let mutants = self.mutants(&unary.op, "UnaryOperator");
        if !mutants.is_empty() {
            let site = self.site(&mutants);
            let (whole, operator) = (self.range(unary), self.range(&unary.op));
            let was = self.file.text[operator.clone()].to_string();
            let end = format!(") {{ v => if {} {{ v }} else {{ {was}v }} }})", on(&mutants[0]));
            self.edit(site, whole.end..whole.end, (0, -(whole.start as i64)), vec![(None, end)]);
            self.instead(site, operator, "(match (");
        }
        visit::visit_expr_unary(self, unary);
    }

    fn visit_expr_struct(&mut self, expression: &'ast syn::ExprStruct) {
        for field in expression.fields.iter() {
            let mutants = self.mutants(field, "StructField");
            let (Some(mutant), Some(rest), syn::Member::Named(name)) =
                (mutants.first(), &expression.rest, &field.member)
            else {
                continue;
            };
            let site = self.site(&mutants[..1]);
            let (whole, value) = (self.range(field), self.range(&field.expr));
            let base = &self.file.text[self.range(&**rest)];
            let before = format!("{name}: if {} {{ ({base}).{name} }} else {{ ", on(mutant));
            self.edit(site, whole.start..value.start, (2, 0), vec![(None, before)]);
            self.edit(site, value.end..value.end, (0, -(whole.start as i64)), vec![(None, " }".to_string())]);
        }
        visit::visit_expr_struct(self, expression);
    }

    fn visit_arm(&mut self, arm: &'ast syn::Arm) {
        self.arm(arm);
        visit::visit_arm(self, arm);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const TEXT: &str = "fn f(a: u8, b: u8) -> bool {\n    a < b && !(a == 0)\n}\n";

    fn mutant(number: usize, genre: &str, start: usize, replacement: &str) -> Mutant {
        Mutant {
            number,
            file: "f.rs".to_string(),
            genre: genre.to_string(),
            start: (2, start),
            end: (2, start + 1),
            replacement: replacement.to_string(),
            returns: "-> bool".to_string(),
            name: String::new(),
        }
    }

    #[test]
    fn what_is_nested_stays_nested_and_what_does_not_compile_is_known() {
        let mutants = [
            mutant(1, "FnValue", 5, "true"),
            mutant(2, "BinaryOperator", 7, ">"),
            mutant(3, "BinaryOperator", 11, "||"),
            mutant(4, "UnaryOperator", 14, ""),
        ];
        let mut file = File::new(TEXT, &mutants.iter().collect::<Vec<_>>()).unwrap();
        let woven = file.weave();
        let on = |number: usize| format!("crate::mutation::on({number})");
        let (one, two, three, four) = (on(1), on(2), on(3), on(4));
        let compared = format!("(match (&(a ), &( b)) {{ (l, r) => if {two} {{ l > r }} else {{ l < r }} }})");
        let negated = format!("(match ((a == 0)) {{ v => if {four} {{ v }} else {{ !v }} }})");
        let both = format!("(if ({compared} ) ^ {three} {{  {negated} }} else {{ {three} }})");
        let wanted = format!("fn f(a: u8, b: u8) -> bool {{ if {one} {{ return true; }}\n    {both}\n}}\n");
        assert_eq!(woven.text, wanted);

        let at = woven.text.find("l > r").unwrap();
        assert_eq!(woven.blame(&(at..at + 1)), Some(Blame::Mutant(2)));
        let at = woven.text.find("a == 0").unwrap();
        let Some(Blame::Site(site)) = woven.blame(&(at..at + 1)) else { panic!("nobody's") };
        assert_eq!(file.drop_site(site), [4]);
        file.drop_mutant(2);
        assert!(file.weave().text.contains(&format!("(if (a < b ) ^ {three} {{  !(a == 0) }} else")));
    }
}
