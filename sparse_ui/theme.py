"""One theme, one stylesheet: Gradio's variables point at the CSS variables of style.css, which know light and dark.

page.js is the little that the page does by itself.
"""

from pathlib import Path

import gradio as gr

from engine.analysis.look import FONT

STYLESHEET = Path(__file__).with_name("style.css")
MONO = ("ui-monospace", "SFMono-Regular", "Consolas", "monospace")

HEAD = f"<script>{Path(__file__).with_name('page.js').read_text(encoding='utf-8')}</script>"

TOGGLE_THEME = """
() => {
  const dark = !document.body.classList.contains("dark");
  localStorage.setItem("sparse-tuning-theme", dark ? "dark" : "light");
  document.body.classList.toggle("dark", dark);
}
"""

_VARIABLES = {
    "body_background_fill": "var(--bg)",
    "body_text_color": "var(--ink)",
    "body_text_color_subdued": "var(--soft)",
    "body_text_size": "14px",
    "color_accent": "var(--accent)",
    "color_accent_soft": "var(--tint)",
    "background_fill_primary": "var(--card)",
    "background_fill_secondary": "var(--bg)",
    "border_color_accent": "var(--accent)",
    "border_color_accent_subdued": "var(--line)",
    "border_color_primary": "var(--line)",
    "link_text_color": "var(--accent)",
    "link_text_color_active": "var(--accent)",
    "link_text_color_hover": "var(--accent)",
    "link_text_color_visited": "var(--accent)",
    "accordion_text_color": "var(--soft)",
    "table_text_color": "var(--ink)",
    "shadow_drop": "none",
    "shadow_drop_lg": "0 8px 24px rgb(0 0 0 / 16%)",
    "shadow_inset": "none",
    "shadow_spread": "0px",
    "block_background_fill": "transparent",
    "block_border_color": "var(--line)",
    "block_border_width": "0px",
    "block_padding": "0px",
    "block_radius": "0px",
    "block_shadow": "none",
    "block_info_text_color": "var(--faint)",
    "block_info_text_size": "12px",
    "block_label_background_fill": "transparent",
    "block_label_border_width": "0px",
    "block_label_shadow": "none",
    "block_label_text_color": "var(--soft)",
    "block_label_text_size": "12px",
    "block_title_text_color": "var(--soft)",
    "block_title_text_size": "12px",
    "block_title_text_weight": "550",
    "panel_background_fill": "transparent",
    "panel_border_width": "0px",
    "section_header_text_size": "14px",
    "code_background_fill": "var(--bg)",
    "chatbot_text_size": "14px",
    "checkbox_background_color": "var(--card)",
    "checkbox_background_color_selected": "var(--accent)",
    "checkbox_border_color": "var(--faint)",
    "checkbox_border_color_selected": "var(--accent)",
    "checkbox_label_background_fill": "transparent",
    "checkbox_label_background_fill_hover": "transparent",
    "checkbox_label_background_fill_selected": "transparent",
    "checkbox_label_border_width": "0px",
    "checkbox_label_padding": "0px",
    "checkbox_label_text_size": "14px",
    "checkbox_shadow": "none",
    "error_background_fill": "var(--card)",
    "error_border_color": "var(--bad)",
    "error_text_color": "var(--bad)",
    "error_icon_color": "var(--bad)",
    "input_background_fill": "var(--card)",
    "input_background_fill_focus": "var(--card)",
    "input_background_fill_hover": "var(--card)",
    "input_border_color": "var(--line)",
    "input_border_color_focus": "var(--accent)",
    "input_border_color_hover": "var(--faint)",
    "input_border_width": "1px",
    "input_padding": "8px 12px",
    "input_placeholder_color": "var(--faint)",
    "input_radius": "8px",
    "input_shadow": "none",
    "input_shadow_focus": "0 0 0 2px var(--tint)",
    "input_text_size": "14px",
    "loader_color": "var(--accent)",
    "prose_text_size": "14px",
    "slider_color": "var(--accent)",
    "stat_background_fill": "var(--accent)",
    "table_border_color": "var(--line)",
    "table_even_background_fill": "transparent",
    "table_odd_background_fill": "transparent",
    "table_row_focus": "var(--tint)",
    "button_border_width": "1px",
    "button_transition": "background-color .12s, border-color .12s",
    "button_large_padding": "8px 16px",
    "button_large_radius": "8px",
    "button_large_text_size": "14px",
    "button_large_text_weight": "600",
    "button_medium_padding": "8px 16px",
    "button_medium_radius": "8px",
    "button_medium_text_size": "14px",
    "button_medium_text_weight": "600",
    "button_small_padding": "5px 12px",
    "button_small_radius": "8px",
    "button_small_text_size": "13px",
    "button_small_text_weight": "600",
    "button_primary_background_fill": "var(--accent)",
    "button_primary_background_fill_hover": "color-mix(in srgb, var(--accent) 88%, var(--ink))",
    "button_primary_border_color": "var(--accent)",
    "button_primary_border_color_hover": "var(--accent)",
    "button_primary_text_color": "var(--on-accent)",
    "button_primary_text_color_hover": "var(--on-accent)",
    "button_primary_shadow": "none",
    "button_primary_shadow_hover": "none",
    "button_secondary_background_fill": "transparent",
    "button_secondary_background_fill_hover": "var(--tint)",
    "button_secondary_border_color": "var(--line)",
    "button_secondary_border_color_hover": "var(--line)",
    "button_secondary_text_color": "var(--accent)",
    "button_secondary_text_color_hover": "var(--accent)",
    "button_secondary_shadow": "none",
    "button_secondary_shadow_hover": "none",
    "button_cancel_background_fill": "transparent",
    "button_cancel_background_fill_hover": "color-mix(in srgb, var(--bad) 10%, transparent)",
    "button_cancel_border_color": "var(--line)",
    "button_cancel_border_color_hover": "var(--line)",
    "button_cancel_text_color": "var(--bad)",
    "button_cancel_text_color_hover": "var(--bad)",
    "button_cancel_shadow": "none",
    "button_cancel_shadow_hover": "none",
}


def build_theme() -> gr.themes.Base:
    """Return the theme. Light and dark use the same variables; the stylesheet changes what they mean."""
    theme = gr.themes.Base(
        primary_hue=gr.themes.colors.indigo, neutral_hue=gr.themes.colors.slate, font=FONT, font_mono=MONO
    )
    dark = {f"{name}_dark": value for name, value in _VARIABLES.items() if hasattr(theme, f"{name}_dark")}
    return theme.set(**_VARIABLES, **dark)
